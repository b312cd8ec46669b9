# SPDX-License-Identifier: Apache-2.0
"""Attention statistics against whole attention matrices."""

from __future__ import annotations

import pytest
import torch

from kvserve.kernels.statistics import attention_mass, lightest, row_attention
from tests.reference.dense_policies import softmax_rows


@pytest.mark.parametrize("chunk", [1, 7, 64, 300, 333])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_mass_adds_up_over_chunks_to_the_column_sums(chunk: int, kv_heads: int) -> None:
    random = torch.Generator().manual_seed(chunk)
    query = torch.randn(6, 333, 16, generator=random)
    key = torch.randn(kv_heads, 333, 16, generator=random)
    total = torch.zeros(kv_heads, 333)
    for first in range(0, 333, chunk):
        last = min(first + chunk, 333)
        part = attention_mass(query[:, first:last], key[:, :last], 0.25)
        total[:, :last] += part
    rows = softmax_rows(query, key, 0.25)
    expected = rows.view(kv_heads, -1, 333, 333).sum(dim=(1, 2))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_a_row_sees_its_own_length_and_no_rubbish_beyond() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 8, generator=random), torch.randn(2, 10, 8)
    key[0, 4:], key[1, 9:] = float("nan"), float("inf")
    found = row_attention(query, key, torch.tensor([4, 9]), 0.5)
    for row, length in enumerate((4, 9)):
        weights = (query[row] @ key[row, :length].T * 0.5).softmax(dim=-1)
        torch.testing.assert_close(found[row, :length], weights.sum(dim=0))
        assert found[row, length:].abs().max() == 0


def test_the_lightest_goes_and_of_equal_ones_the_earliest_position() -> None:
    mass = torch.tensor([[3.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    position = torch.tensor([[0, 7, 5, 9, -1], [3, 2, 4, 9, -1]], dtype=torch.int32)
    safe_from = torch.tensor([9, 4])
    assert lightest(mass, position, safe_from).tolist() == [2, 1]
