# SPDX-License-Identifier: Apache-2.0
"""Our decode attention on CPUs against float64, on pages full of traps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvserve.kernels import native
from kvserve.kernels.page_formats import FORMATS
from tests.unit.strewn_pages import STORED, put_on_page, trapped_pool

pytestmark = pytest.mark.skipif(
    not native.can_attend(torch.float32, 64, 32), reason="needs a C++ compiler"
)
ERROR = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
# At, just below and just above pages and what is softened together; nothing at all;
# long enough to be cut into parts.
LENGTHS = [1, 0, 31, 32, 33, 127, 128, 129, 1000, 4099]


def attend(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    group: int = 3,
    width: int = 64,
    page_size: int = 32,
    loudness: float = 1.0,
    stored: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on strewn pages; all that no row may read is NaN or page -1."""
    kind = STORED[stored or str(dtype).removeprefix("torch.")]
    counts = [-(-length // page_size) for length in lengths]
    pool = trapped_pool(kind, sum(counts) + 1, page_size, width)
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    free = iter((torch.randperm(sum(counts)) + 1).tolist())
    query = (loudness * torch.randn(len(lengths), group, width)).to(dtype)
    wanted = torch.zeros(query.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        keys, values = torch.randn(2, length, width).to(dtype)
        seen = []
        for place, first in enumerate(range(0, length, page_size)):
            table[row, place] = page = next(free)
            own = slice(first, first + page_size)
            seen.append(put_on_page(kind, pool[page], keys[own], values[own]))
        if length:
            whole = [torch.cat(part).double() for part in zip(*seen, strict=True)]
            logits = query[row].double() @ whole[0].T * width**-0.5
            wanted[row] = logits.softmax(-1) @ whole[1]
    out = torch.full_like(query, torch.nan)
    native.decode_attention(
        query, pool, torch.tensor(lengths).int(), table, width**-0.5, out
    )
    return out.double(), wanted


def worst_error(out: Tensor, wanted: Tensor) -> float:
    lengths = wanted.norm(dim=-1).clamp(min=0.05)
    return float(((out - wanted).norm(dim=-1) / lengths).max())


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_groups_and_widths(dtype: torch.dtype, group: int, width: int) -> None:
    torch.manual_seed(group)
    out, wanted = attend(LENGTHS, dtype, group, width)
    assert worst_error(out, wanted) < ERROR[dtype]
    assert (out[LENGTHS.index(0)] == 0).all()


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("page_size", [32, 64, 96, 128, 256])
def test_page_sizes(dtype: torch.dtype, page_size: int) -> None:
    torch.manual_seed(page_size)
    assert worst_error(*attend(LENGTHS, dtype, page_size=page_size)) < ERROR[dtype]


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(("group", "page_size"), [(1, 32), (3, 32), (4, 64), (9, 128)])
def test_pages_of_another_type(
    dtype: torch.dtype, stored: str, group: int, page_size: int
) -> None:
    torch.manual_seed(group)
    found = attend(LENGTHS, dtype, group, page_size=page_size, stored=stored)
    assert worst_error(*found) < ERROR[dtype]


def test_scores_that_are_far_apart() -> None:
    torch.manual_seed(1)
    assert worst_error(*attend(LENGTHS, loudness=100.0)) < 1e-4


def test_one_long_row_among_many_short_ones() -> None:
    torch.manual_seed(2)
    assert worst_error(*attend([5] * 300 + [20_000] + [70] * 100)) < 1e-5


def test_no_rows() -> None:
    none = torch.empty(0, 3, 64)
    pool, index = torch.empty(2, 1, 32, 128), torch.empty(0, dtype=torch.int32)
    native.decode_attention(none, pool, index, index[:, None], 1.0, none)


def test_what_it_does_not_take() -> None:
    assert not native.can_attend(torch.float16, 64, 32)
    assert not native.can_attend(torch.bfloat16, 80, 32)
    assert not native.can_attend(torch.bfloat16, 64, 48)
