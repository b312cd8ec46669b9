# SPDX-License-Identifier: Apache-2.0
"""Pages of other numbers than the model's, written and read by the Triton kernels."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kvserve.kernels import reference
from kvserve.kernels.page_formats import FORMATS, PageFormat
from tests.reference.quantised import CACHES

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from kvserve.engine.devices.gpu import TritonDevice  # noqa: E402
from kvserve.kernels import triton_pages, triton_rows  # noqa: E402
from tests.kernels.test_triton_rows import (  # noqa: E402
    DECODE,
    DEVICE,
    MIXED,
    Case,
    make_case,
    relative_error,
)

pytestmark = pytest.mark.gpu
PAGE_SIZE = 32
formats = pytest.mark.parametrize("page_format", FORMATS.values(), ids=list(FORMATS))


def empty_pool(page_format: PageFormat, pages: int, head_size: int) -> Tensor:
    """A pool that holds garbage."""
    shape = page_format.pool_shape(pages, PAGE_SIZE, head_size)
    pool = torch.full(shape, 77, dtype=page_format.pool)
    return pool.to(DEVICE)


def stored(case: Case, page_format: PageFormat) -> tuple[Tensor, Case]:
    """The case's tokens in pages of a format; the case as the reference rounds it."""
    pages, _, size, width = case.pool.shape
    keys, values = case.pool.view(-1, width).nan_to_num().chunk(2, dim=-1)
    pool = empty_pool(page_format, pages, width // 2)
    slots = torch.arange(pages * size, device=DEVICE)
    triton_pages.write_rows(keys, values, pool, slots, page_format)
    rounded = CACHES[page_format.name]
    both = torch.cat([rounded(half.float().cpu()) for half in (keys, values)], dim=-1)
    as_read = both.view(pages, 1, size, width).to(case.query)
    return pool, Case(
        case.scale,
        case.query,
        as_read,
        case.query_start,
        case.seq_lens,
        case.page_table,
    )


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
def test_pages_hold_what_the_reference_rounds_to(
    page_format: PageFormat, dtype: torch.dtype, head_size: int
) -> None:
    torch.manual_seed(head_size)
    device = TritonDevice(torch.device(DEVICE), 4, page_format)
    pool = empty_pool(page_format, 5, head_size)
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
    out = torch.full_like(case.query, float("nan"))
    rows = case.query_start, case.seq_lens, case.page_table
    most = max(queries for queries, _ in lengths)
    mass = as_read.empty_mass()
    triton_rows.row_attention(
        case.query, pool, *rows, case.scale, out, most, mass, page_format
    )
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
