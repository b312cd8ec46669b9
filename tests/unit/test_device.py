# SPDX-License-Identifier: Apache-2.0
"""The CPU device gives back what it was given, however a page lies in memory."""

from __future__ import annotations

import pytest
import torch

from kvserve.engine.device import CPUDevice


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
    pages = torch.tensor([[2], [5], [1]])
    slots = (pages * page_size + torch.arange(page_size)).flatten()
    device.write(keys, values, pool, slots)
    for found, expected in (
        (device.read_keys(pool, pages), keys),
        (device.read_values(pool, pages), values),
    ):
        assert found.shape == (3, 1, page_size, head_size)
        assert torch.equal(found.reshape(shape), expected)
