# SPDX-License-Identifier: Apache-2.0
"""Rows with a hole in their keys, in the Triton kernels, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvserve.engine.batch.rows import RowShapes
from kvserve.kernels import reference
from kvserve.kernels.page_formats import FP8, INT8, PageFormat
from kvserve.kernels.score_form import RowScores
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    ERROR,
    HEADS,
    Case,
    check_attention,
    make_case,
    make_scores,
    stored,
)
from tests.kernels.device_cache import GROUP, SCALE, WIDTH, Cache
from tests.unit.score_forms import FORMS, make_form

pytestmark = pytest.mark.gpu
Row = tuple[int, int, tuple[int, int]]
# Queries, keys and gap of each row: parts of pages and of blocks of keys, whole ones,
# gaps over the splits of a long row, and in a chunk's own keys; none, and nothing else.
ROWS: list[Row] = [
    (1, 90, (40, 64)), (1, 1500, (500, 1100)), (1, 64, (0, 0)), (1, 70, (0, 70)),
    (1, 800, (0, 800)), (1, 90, (0, 33)), (1, 65, (64, 65)), (0, 30, (1, 2)),
    (32, 96, (33, 64)), (20, 20, (3, 9)), (40, 130, (0, 128)), (5, 9, (0, 9)),
    (2, 65, (7, 7)), (1, 0, (0, 0)),
]  # fmt: skip
SHORT = [row for row in ROWS if row[1] < 100]
MOST_QUERIES = 40


def gapped_case(
    dtype: torch.dtype, group: int, rows: list[Row] = ROWS
) -> tuple[Case, Tensor]:
    """Random rows, and their gaps."""
    torch.manual_seed(group)
    lengths = [(queries, keys) for queries, keys, _ in rows]
    gaps = torch.tensor([gap for *_, gap in rows], dtype=torch.int32, device=DEVICE)
    return make_case(lengths, group, head_size=64, page_size=32, dtype=dtype), gaps


def spoil_keys(case: Case, gaps: Tensor) -> None:
    """Let keys that nobody looks at be no numbers."""
    page_size, width = case.pool.shape[2], case.pool.shape[3] // 2
    for row, gap in enumerate(gaps.tolist()):
        for key in range(*gap):
            page = int(case.page_table[row, key // page_size])
            case.pool[page, 0, key % page_size, :width] = float("nan")


def check(
    case: Case,
    gaps: Tensor,
    pool: Tensor,
    as_read: Case,
    page_format: PageFormat | None = None,
    scores: RowScores | None = None,
) -> None:
    """Compare attention, and what tokens draw, with float64."""
    mass = case.empty_mass()
    out = case.run(MOST_QUERIES, mass, pool, page_format, scores, gaps)
    check_attention(out, as_read.wanted(scores, gaps))
    drawn = as_read.wanted_mass(scores, gaps)
    assert (mass.drawn - drawn).abs().max() < ERROR[out.dtype]


@pytest.mark.parametrize(
    ("parts", "group", "dtype"),
    [
        ("", 4, DTYPES[-1]),
        (FORMS[-1], 3, torch.float32),
        ("window", 3, torch.float32),
    ],
    ids=str,
)
def test_no_query_sees_a_gap_of_its_row(
    parts: str, group: int, dtype: torch.dtype
) -> None:
    case, gaps = gapped_case(dtype, group)
    spoil_keys(case, gaps)
    form = make_form(parts, HEADS * group, DEVICE)
    scores = make_scores(case, form) if parts else None
    check(case, gaps, case.pool, case, scores=scores)


@pytest.mark.parametrize("page_format", [INT8, FP8], ids=lambda it: it.name)
def test_gaps_in_pages_of_bytes(page_format: PageFormat) -> None:
    case, gaps = gapped_case(torch.float32, 3, SHORT)
    check(case, gaps, *stored(case, page_format), page_format)


def test_gaps_without_keys_change_nothing() -> None:
    case = make_case([(1, 1500), (9, 40)], group=3, head_size=64, page_size=32)
    none = torch.tensor([[0, 0], [7, 7]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(case.run(9, gaps=none), case.run(9))


def test_the_reference_sees_what_a_row_without_the_keys_would() -> None:
    case = make_case([(1, 96)], head_size=64, page_size=32, dtype=torch.float32)
    rows = case.query_start, case.seq_lens, case.page_table
    gaps = torch.tensor([[32, 64]], dtype=torch.int32, device=DEVICE)
    found = reference.row_attention(
        case.query, case.pool, *rows, case.scale, None, gaps
    )
    without = rows[0], rows[1] - 32, rows[2][:, [0, 2]]
    whole = reference.row_attention(case.query, case.pool, *without, case.scale)
    torch.testing.assert_close(found, whole)


def test_the_device_gives_each_row_of_a_mixed_step_its_gap() -> None:
    cache = Cache()
    assert cache.device.supports_gaps
    query = torch.randn(4, GROUP, WIDTH, device=DEVICE)
    starts = np.array([0, 1, 4], dtype=np.int32)
    lengths = np.array([40, 97], dtype=np.int32)
    gaps = np.array([[3, 30], [33, 64]], dtype=np.int32)
    rows = cache.device.plan_rows(RowShapes(1, starts, lengths, np.arange(2), gaps))
    out, table = torch.full_like(query, float("nan")), cache.table[[0, 4]]
    cache.device.attend(query, cache.pool, rows, table, SCALE, out)
    read = rows.query_start, rows.seq_lens, table, SCALE
    expected = reference.row_attention(query, cache.pool, *read, gaps=rows.gaps)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    plain = reference.row_attention(query, cache.pool, *read)
    assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)
