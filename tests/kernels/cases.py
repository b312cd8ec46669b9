# SPDX-License-Identifier: Apache-2.0
"""Rows for the Triton kernels to read, on a GPU or in Triton's interpreter.

Importing this skips a test file where there is neither.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvserve.kernels import reference
from kvserve.kernels.page_formats import PageFormat
from kvserve.kernels.score_form import Positions, RowScores, ScoreForm
from tests.reference.quantised import CACHES
from tests.unit.score_forms import LAST, scattered_positions

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from kvserve.kernels import triton_pages, triton_rows  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The interpreter multiplies bfloat16 matrices as if they were integers.
DTYPES = [dtype for dtype in ERROR if not (INTERPRETED and dtype is torch.bfloat16)]
NAN = float("nan")
HEADS = 2
"""KV heads of rows whose scores have a form."""


@dataclass
class Case:
    """Arguments of ``row_attention``, and what must come of them in float64."""

    scale: float
    query: Tensor
    pool: Tensor
    query_start: Tensor
    seq_lens: Tensor
    page_table: Tensor

    def run(
        self,
        max_query_len: int,
        mass: triton_rows.Mass | None = None,
        pool: Tensor | None = None,
        page_format: PageFormat | None = None,
        scores: RowScores | None = None,
        gaps: Tensor | None = None,
    ) -> Tensor:
        """Attend, to the pages of ``pool`` if that holds the tokens in a format."""
        out = torch.full_like(self.query, NAN)
        pool = self.pool if pool is None else pool
        rows = self.query_start, self.seq_lens, self.page_table
        triton_rows.row_attention(
            self.query, pool, *rows, self.scale, out, max_query_len, mass,
            page_format, scores, gaps,
        )  # fmt: skip
        return out

    def empty_mass(self) -> triton_rows.Mass:
        """Some mass in every slot already, and garbage to work in."""
        pages, _, page_size, _ = self.pool.shape
        scores = self.pool.new_full(
            (pages, page_size, self.query.shape[1]), NAN, dtype=torch.float32
        )
        return triton_rows.Mass(torch.ones_like(scores[..., 0]), scores)

    def wanted_mass(
        self, scores: RowScores | None = None, gaps: Tensor | None = None
    ) -> Tensor:
        drawn = torch.ones(self.pool.shape[0], self.pool.shape[2], device=DEVICE)
        reference.add_row_mass(*self._in_float64(), drawn, scores, gaps)
        return drawn

    def wanted(
        self, scores: RowScores | None = None, gaps: Tensor | None = None
    ) -> Tensor:
        return reference.row_attention(*self._in_float64(), scores, gaps)

    def _in_float64(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        rows = self.query_start, self.seq_lens, self.page_table
        return self.query.double(), self.pool.double(), *rows, self.scale


def make_case(
    lengths: list[tuple[int, int]],
    group: int = 4,
    head_size: int = 128,
    page_size: int = 16,
    dtype: torch.dtype = DTYPES[-1],
) -> Case:
    """Random rows on shuffled pages; what no row may read is NaN or page -1. Page 0,
    where masked look-ups end, is never a row's."""
    q_lens, seq_lens = torch.tensor(lengths).unbind(1)
    pages = -(-seq_lens // page_size)
    num_pages = int(pages.sum()) + 3
    pool = torch.full((num_pages, 1, page_size, 2 * head_size), NAN, dtype=dtype)
    page_table = torch.full((len(lengths), int(pages.max()) + 2), -1, dtype=torch.int32)
    order = 1 + torch.randperm(num_pages - 1)[: int(pages.sum())]
    for row, own in enumerate(order.split_with_sizes(pages.tolist())):
        page_table[row, : len(own)] = own
        token = torch.arange(int(seq_lens[row]))
        slots = own[token // page_size] * page_size + token % page_size
        keys, values = torch.randn(2, len(token), head_size).to(dtype)
        reference.write_rows(keys, values, pool, slots)
    query = torch.randn(int(q_lens.sum()), group, head_size).to(dtype)
    query_start = torch.cat([torch.zeros(1), q_lens.cumsum(0)]).int()
    tensors = query, pool, query_start, seq_lens.int(), page_table
    return Case(head_size**-0.5, *(tensor.to(DEVICE) for tensor in tensors))


def make_scores(case: Case, form: ScoreForm) -> RowScores:
    """Give each row a KV head, and tokens and positions of its own."""
    lengths, page_size = case.seq_lens.tolist(), case.pool.shape[2]
    slots, _ = scattered_positions(
        case.page_table.cpu(), lengths, 1, len(case.pool), page_size
    )
    starts = case.query_start.cpu()
    order = torch.randperm(len(lengths))
    first = (starts[:-1] * HEADS + order % HEADS).to(DEVICE)
    # Where a row's last query stands does not matter, but that they follow one another.
    own = LAST + torch.arange(int(starts[-1])).int()
    return RowScores(form, first, Positions(slots.to(DEVICE), own.to(DEVICE)))


def empty_pool(
    page_format: PageFormat, pages: int, page_size: int, head_size: int
) -> Tensor:
    """A pool that holds garbage."""
    shape = page_format.pool_shape(pages, page_size, head_size)
    return torch.full(shape, 77, dtype=page_format.pool).to(DEVICE)


def stored(case: Case, page_format: PageFormat) -> tuple[Tensor, Case]:
    """The case's tokens in pages of a format; the case as the reference rounds it."""
    pages, _, size, width = case.pool.shape
    keys, values = case.pool.view(-1, width).nan_to_num().chunk(2, dim=-1)
    pool = empty_pool(page_format, pages, size, width // 2)
    slots = torch.arange(pages * size, device=DEVICE)
    triton_pages.write_rows(keys, values, pool, slots, page_format)
    rounded = CACHES[page_format.name]
    both = torch.cat([rounded(half.float().cpu()) for half in (keys, values)], dim=-1)
    return pool, replace(case, pool=both.view(pages, 1, size, width).to(case.query))


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def check_attention(out: Tensor, wanted: Tensor) -> None:
    """Hold all queries together, and the worst of them, against float64."""
    assert relative_error(out, wanted) < ERROR[out.dtype]
    # Norms hide a wrong short row behind many right ones: look at the worst query.
    worst = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=0.05)
    assert worst.max() < 5 * ERROR[out.dtype]
