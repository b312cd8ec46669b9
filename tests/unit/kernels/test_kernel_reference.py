# SPDX-License-Identifier: Apache-2.0
"""The reference kernels against PyTorch's own attention on dense sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvserve.kernels import reference

HEAD_SIZE = 16


def paged(
    sequences: list[tuple[Tensor, Tensor]], page_size: int
) -> tuple[Tensor, Tensor]:
    """Write dense (K, V) ``[tokens, D]`` into shuffled pages: (pool, page table)."""
    pages = [-(-len(keys) // page_size) for keys, _ in sequences]
    order = torch.randperm(sum(pages)).tolist()
    dtype = sequences[0][0].dtype
    # Unwritten slots are NaN: reading one shows.
    pool = torch.full(
        (sum(pages), 1, page_size, 2 * HEAD_SIZE), float("nan"), dtype=dtype
    )
    page_table = torch.full((len(sequences), max(pages)), -1, dtype=torch.int32)
    for row, (keys, values) in enumerate(sequences):
        own = torch.tensor([order.pop() for _ in range(pages[row])])
        page_table[row, : len(own)] = own
        token = torch.arange(len(keys))
        slots = own[token // page_size] * page_size + token % page_size
        reference.write_rows(keys, values, pool, slots)
    return pool, page_table


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """PyTorch's attention for one row, its queries the last of the sequence."""
    q_len, seq_len = len(query), len(keys)
    visible = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len)
    return scaled_dot_product_attention(
        query.transpose(0, 1), keys[None], values[None], attn_mask=visible, scale=scale
    ).transpose(0, 1)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_dense_attention(
    page_size: int, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q_lens, seq_lens = [1, 7, 0, 33, 1], [40, 7, 20, 90, 1]
    sequences = [
        (torch.randn(s, HEAD_SIZE, dtype=dtype), torch.randn(s, HEAD_SIZE, dtype=dtype))
        for s in seq_lens
    ]
    pool, page_table = paged(sequences, page_size)
    query = torch.randn(sum(q_lens), group, HEAD_SIZE, dtype=dtype)
    query_start = torch.tensor([0, *q_lens]).cumsum(0).int()
    out = reference.row_attention(
        query, pool, query_start, torch.tensor(seq_lens).int(), page_table, scale=0.3
    )
    rows = zip(query.split_with_sizes(q_lens), sequences, strict=True)
    wanted = torch.cat([dense(q, k, v, 0.3) for q, (k, v) in rows if len(q)])
    torch.testing.assert_close(out, wanted)


def test_bfloat16_attends_in_float32() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 50, HEAD_SIZE, dtype=torch.bfloat16)
    pool, page_table = paged([(keys, values)], page_size=16)
    query = torch.randn(3, 2, HEAD_SIZE, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 3]).int(), torch.tensor([50]).int()
    out = reference.row_attention(query, pool, *bounds, page_table, scale=0.25)
    wanted = dense(query.float(), keys.float(), values.float(), 0.25).bfloat16()
    torch.testing.assert_close(out, wanted)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    pool = torch.randn(1, 1, 16, 2 * HEAD_SIZE)
    query = torch.randn(3, 2, HEAD_SIZE)
    # Row 0 is empty; row 1 has two queries for one key, so its first sees none.
    out = reference.row_attention(
        query,
        pool,
        torch.tensor([0, 1, 3]).int(),
        torch.tensor([0, 1]).int(),
        torch.zeros(2, 1, dtype=torch.int32),
        scale=1.0,
    )
    assert not out[:2].any()
    torch.testing.assert_close(out[2], pool[0, 0, :1, HEAD_SIZE:].expand(2, -1))


def test_write_rows_skips_negative_slots() -> None:
    pool = torch.zeros(2, 1, 16, 2 * HEAD_SIZE)
    key, value = torch.randn(2, 3, HEAD_SIZE)
    reference.write_rows(key, value, pool, torch.tensor([17, -1, 3]))
    assert torch.equal(pool[1, 0, 1], torch.cat([key[0], value[0]]))
    assert torch.equal(pool[0, 0, 3], torch.cat([key[2], value[2]]))
    assert pool.count_nonzero() == 4 * HEAD_SIZE


def test_copy_pages_moves_whole_pages() -> None:
    pool = torch.randn(6, 1, 16, 2 * HEAD_SIZE)
    before = pool.clone()
    reference.copy_pages(pool, torch.tensor([0, 5]), torch.tensor([3, 1]))
    assert torch.equal(pool[[3, 1]], before[[0, 5]])
    assert torch.equal(pool[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
