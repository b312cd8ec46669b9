# SPDX-License-Identifier: Apache-2.0
"""The CPU device gives back what it was given, however a page lies in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.kernels import native
from tests.unit.device_pages import check_mass, check_round_trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page_size", "head_size"), [(32, 64), (64, 128), (32, 32)])
def test_pages_read_as_they_were_written(
    dtype: torch.dtype, page_size: int, head_size: int
) -> None:
    device = CPUDevice(dtype, 3, head_size, page_size)
    random = torch.Generator().manual_seed(page_size)
    shape = (3 * page_size, head_size)
    pool = torch.zeros(6, 1, page_size, 2 * head_size, dtype=dtype)
    keys, values = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    check_round_trip(device, pool, keys, values, as_read=torch.clone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_attention_is_added_to_the_tokens_that_were_written(
    dtype: torch.dtype, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    device = CPUDevice(dtype, 3, 64, 32)
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(96, 64, generator=random).to(dtype)
    pool = torch.zeros(9, 1, 32, 128, dtype=dtype)
    query = torch.randn(2, 3, 64, generator=random).to(dtype)
    check_mass(device, pool, keys, query, as_read=torch.clone)


@pytest.mark.parametrize("decodes", [0, 1, 3])
def test_our_kernels_attend_as_the_stock_kernel_does(
    decodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three decodes, and chunks of 40 and 5 tokens, over two KV heads of three."""
    random = torch.Generator().manual_seed(0)
    heads, chunks = 2, [(40, 100), (5, 5)]
    rows = [(1, 7 + 30 * row) for row in range(decodes * heads)] + chunks * heads
    tokens = decodes + sum(count for count, _ in chunks)
    before = np.cumsum([0, *(count for count, _ in chunks)])[:-1]
    shapes = RowShapes(
        num_decodes=decodes * heads,
        query_start=np.cumsum([0, *(c for c, _ in rows)]).astype(np.int32),
        seq_lens=np.array([length for _, length in rows], dtype=np.int32),
        first=np.concatenate(
            [np.arange(decodes * heads)]
            + [(decodes + before) * heads + head for head in range(heads)]
        ),
    )
    keys, values = torch.randn(2, len(rows) * 128, 64, generator=random)
    table = (torch.randperm(len(rows) * 4, generator=random).view(-1, 4) + 1).int()
    slots = (table.flatten()[:, None] * 32 + torch.arange(32)).flatten()
    query = torch.randn(tokens, heads * 3, 64, generator=random)
    found = []
    for is_ours in (True, False):
        if not is_ours:
            monkeypatch.setattr(native, "can_attend", lambda *_: False)
        device = CPUDevice(torch.float32, 3, 64, 32)
        pool, out = torch.zeros(len(rows) * 4 + 1, 1, 32, 128), torch.zeros_like(query)
        device.write(keys, values, pool, slots.long())
        device.attend(query, pool, device.plan_rows(shapes), table, 0.125, out)
        found.append(out)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
