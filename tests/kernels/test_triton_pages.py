# SPDX-License-Identifier: Apache-2.0
"""Pages of other numbers than the model's, written and read by the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from kvserve.kernels import reference
from kvserve.kernels.page_formats import FORMATS, PageFormat
from tests.kernels.cases import (
    DEVICE,
    empty_pool,
    make_case,
    relative_error,
    stored,
)
from tests.kernels.test_triton_rows import DECODE, MIXED
from tests.reference.quantised import CACHES

# After the check that there is something to run Triton.
from kvserve.engine.devices.gpu import TritonDevice  # isort: skip
from kvserve.kernels import triton_pages  # isort: skip

pytestmark = pytest.mark.gpu
PAGE_SIZE = 32
formats = pytest.mark.parametrize("page_format", FORMATS.values(), ids=list(FORMATS))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
def test_pages_hold_what_the_reference_rounds_to(
    page_format: PageFormat, dtype: torch.dtype, head_size: int
) -> None:
    torch.manual_seed(head_size)
    device = TritonDevice(torch.device(DEVICE), 4, page_format)
    pool = empty_pool(page_format, 5, PAGE_SIZE, head_size)
    before = pool.clone()
    sizes = torch.logspace(-9, 3, 40)[:, None]
    keys, values = (torch.randn(2, 40, head_size) * sizes).to(dtype).to(DEVICE)
    keys[3] = 0
    slots = torch.randperm(3 * PAGE_SIZE, device=DEVICE)[:40]
    slots[7] = -1
    device.write(keys, values, pool, slots)
    pages = torch.arange(5, device=DEVICE)
    wanted = slots >= 0
    read = CACHES[page_format.name]
    for found, tokens in (
        (device.read_keys(pool, pages), keys),
        (device.read_values(pool, pages), values),
    ):
        own = found.reshape(-1, head_size)[slots[wanted]].float().cpu()
        assert torch.equal(own, read(tokens[wanted].float().cpu()))
    assert torch.equal(pool[3:], before[3:])


@formats
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_attention_is_that_of_what_pages_hold(
    page_format: PageFormat, lengths: list[tuple[int, int]]
) -> None:
    torch.manual_seed(1)
    case = make_case(lengths, head_size=64, page_size=PAGE_SIZE, dtype=torch.float32)
    pool, as_read = stored(case, page_format)
    most = max(queries for queries, _ in lengths)
    mass = as_read.empty_mass()
    out = case.run(most, mass, pool, page_format)
    assert relative_error(out, as_read.wanted()) < 1e-5
    assert (mass.drawn - as_read.wanted_mass()).abs().max() < 1e-5


@formats
def test_pages_are_copied_whole(page_format: PageFormat) -> None:
    torch.manual_seed(2)
    case = make_case([(1, 300)], head_size=64, page_size=PAGE_SIZE, dtype=torch.float32)
    pool, _ = stored(case, page_format)
    wanted = pool.clone()
    source, target = torch.randperm(10, device=DEVICE).view(2, 5)
    triton_pages.copy_pages(pool, source, target)
    reference.copy_pages(wanted, source, target)
    assert torch.equal(pool, wanted)
