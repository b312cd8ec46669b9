# SPDX-License-Identifier: Apache-2.0
"""Our attention of prompts on CPUs against float64, on pages full of traps."""

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
# Queries and keys: whole prompts, late chunks, blocks of a bounded head, a query alone;
# at, just below and just above what is softened together and what makes a tile.
ROWS = [(1, 1), (2, 2), (33, 33), (63, 64), (64, 64), (65, 65), (200, 200)]
ROWS += [(32, 544), (7, 519), (1, 700), (43, 129), (100, 1000)]


def attend(
    rows: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    group: int = 3,
    width: int = 64,
    page_size: int = 32,
    loudness: float = 1.0,
    kv_heads: int = 2,
    stored: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run every (row, KV head) on strewn pages; nobody may read NaN or page -1."""
    kind = STORED[stored or str(dtype).removeprefix("torch.")]
    tokens, heads = sum(count for count, _ in rows), kv_heads * group
    counts = [-(-length // page_size) for _, length in rows]
    total = sum(counts) * kv_heads
    pool = trapped_pool(kind, total + 1, page_size, width)
    shape = kv_heads * len(rows), max(counts) + 1
    table = torch.full(shape, -1, dtype=torch.int32)
    free = iter((torch.randperm(total) + 1).tolist())
    query = (loudness * torch.randn(tokens, heads, width)).to(dtype)
    wanted = torch.zeros(query.shape, dtype=torch.float64)
    starts: list[int] = []
    for head in range(kv_heads):
        token, own_heads = 0, slice(head * group, (head + 1) * group)
        for count, length in rows:
            keys, values = torch.randn(2, length, width).to(dtype)
            seen = []
            for place, first in enumerate(range(0, length, page_size)):
                table[len(starts), place] = page = next(free)
                own = slice(first, first + page_size)
                seen.append(put_on_page(kind, pool[page], keys[own], values[own]))
            whole = [torch.cat(part).double() for part in zip(*seen, strict=True)]
            asked = query[token : token + count, own_heads].double()
            logits = torch.einsum("qgd,kd->gqk", asked, whole[0]) * width**-0.5
            hidden = torch.ones(count, length).triu(length - count + 1).bool()
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            found = torch.einsum("gqk,kd->qgd", weights, whole[1])
            wanted[token : token + count, own_heads] = found
            starts.append(token * kv_heads + head)
            token += count
    out = torch.full_like(query, torch.nan).unflatten(1, (kv_heads, group))
    # As a slice of a fused projection: tokens lie further apart than they are wide.
    strided = torch.cat([query, query], dim=1)[:, :heads].view(out.shape)
    lengths = [torch.tensor(part * kv_heads).int() for part in zip(*rows, strict=True)]
    native.prefill_attention(
        strided, pool, torch.tensor(starts), *lengths, table, width**-0.5, out
    )
    return out.flatten(1, 2).double(), wanted


def worst_error(out: Tensor, wanted: Tensor) -> float:
    lengths = wanted.norm(dim=-1).clamp(min=0.05)
    return float(((out - wanted).norm(dim=-1) / lengths).max())


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_groups_and_widths(dtype: torch.dtype, group: int, width: int) -> None:
    torch.manual_seed(group)
    assert worst_error(*attend(ROWS, dtype, group, width)) < ERROR[dtype]


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("page_size", [32, 64, 96, 128, 256])
def test_page_sizes(dtype: torch.dtype, page_size: int) -> None:
    torch.manual_seed(page_size)
    found = attend(ROWS, dtype, page_size=page_size)
    assert worst_error(*found) < ERROR[dtype]


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(("group", "page_size"), [(1, 32), (3, 32), (7, 64)])
def test_pages_of_another_type(
    dtype: torch.dtype, stored: str, group: int, page_size: int
) -> None:
    torch.manual_seed(group)
    found = attend(ROWS, dtype, group, page_size=page_size, stored=stored)
    assert worst_error(*found) < ERROR[dtype]


def test_more_heads_than_a_tile_has_pairs() -> None:
    torch.manual_seed(0)
    assert worst_error(*attend([(3, 40)], group=150, kv_heads=1)) < 1e-5


def test_scores_that_are_far_apart() -> None:
    torch.manual_seed(1)
    assert worst_error(*attend(ROWS, loudness=100.0)) < 1e-4


def test_a_query_without_keys_gets_zeros() -> None:
    out = run_one_row(torch.randn(3, 1, 1, 32), first=0, count=3, length=1)
    assert (out[:2] == 0).all()
    assert (out[2] != 0).all()


def test_a_row_leaves_other_queries_alone() -> None:
    out = run_one_row(torch.randn(4, 2, 1, 32), first=1 * 2 + 1, count=2, length=2)
    assert (out[1:3, 1] != 0).all()
    out[1:3, 1] = 0
    assert (out == 0).all()


def run_one_row(query: Tensor, first: int, count: int, length: int) -> Tensor:
    """Attend to a page of random numbers; what is not written to stays zero."""
    pool, out = torch.randn(1, 1, 32, 64), torch.zeros_like(query)
    table = torch.zeros(1, 1, dtype=torch.int32)
    sizes = [torch.tensor([size]).int() for size in (count, length)]
    native.prefill_attention(query, pool, torch.tensor([first]), *sizes, table, 1, out)
    return out
