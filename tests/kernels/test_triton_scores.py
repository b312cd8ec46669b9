# SPDX-License-Identifier: Apache-2.0
"""Sinks, soft caps and slopes in the Triton kernels, against the reference in float64.

The reference itself is held against float64 key by key in
``tests/unit/kernels/test_score_form_statistics.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvserve.engine.batch.rows import RowShapes
from kvserve.kernels import reference, statistics
from kvserve.kernels.page_formats import INT8
from kvserve.kernels.score_form import Positions, RowScores, ScoreForm
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    ERROR,
    HEADS,
    make_case,
    make_scores,
    relative_error,
    stored,
)
from tests.kernels.device_cache import GROUP, PAGES, SCALE, SIZE, WIDTH, Cache
from tests.unit.score_forms import (
    FORMS,
    LAST,
    LOUD,
    WINDOWS,
    make_form,
    scattered_positions,
)

pytestmark = pytest.mark.gpu
MIXED = [(1, 1), (1, 1500), (0, 30), (32, 96), (0, 0), (20, 20), (1, 64), (2, 65)]
ALL = FORMS[-1]


@pytest.mark.parametrize(
    ("parts", "group", "dtype"),
    [(parts, 3, torch.float32) for parts in FORMS + WINDOWS]
    + [(ALL, group, torch.float32) for group in (1, 8)]
    + [(ALL, 4, DTYPES[-1])],
    ids=str,
)
def test_attention_and_mass(parts: str, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(group)
    case = make_case(MIXED, group=group, head_size=64, page_size=32, dtype=dtype)
    case.query *= LOUD
    scores = make_scores(case, make_form(parts, HEADS * group, DEVICE))
    mass = case.empty_mass()
    out = case.run(32, mass, scores=scores)
    assert relative_error(out, case.wanted(scores)) < ERROR[dtype]
    assert (mass.drawn - case.wanted_mass(scores)).abs().max() < ERROR[dtype]


def test_pages_of_bytes() -> None:
    torch.manual_seed(1)
    case = make_case(MIXED, head_size=64, page_size=32, dtype=torch.float32)
    pool, as_read = stored(case, INT8)
    scores = make_scores(case, make_form(ALL, HEADS * 4, DEVICE))
    out = case.run(32, None, pool, INT8, scores)
    assert relative_error(out, as_read.wanted(scores)) < 1e-5


def device_case() -> tuple[Cache, Positions]:
    """A cache, and where its tokens stand."""
    cache = Cache()
    lengths = cache.lengths.tolist()
    slots, _ = scattered_positions(cache.table.cpu(), lengths, 1, PAGES, SIZE)
    own = torch.full((len(lengths),), LAST).int()
    return cache, Positions(slots.to(DEVICE), own.to(DEVICE))


def test_the_device_knows_the_heads_of_rows_that_are_meant() -> None:
    cache, positions = device_case()
    form = make_form(ALL, 3 * GROUP, DEVICE)
    cached = cache.rows(1, 2, 4)
    mass = torch.ones(PAGES, SIZE, device=DEVICE)
    expected = mass.clone()
    what = cached, SCALE, expected, form, positions
    statistics.add_row_attention(cache.query, cache.keys_of(cached), *what)
    cache.device.prepare_statistics(cache.pool)
    what = cached, SCALE, mass, form, positions
    cache.device.add_row_attention(cache.query, cache.pool, *what)
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_device_knows_the_heads_of_rows_in_a_mixed_step(heads: int) -> None:
    cache, positions = device_case()
    form = make_form(ALL, heads * GROUP, DEVICE)
    # A decode, and a chunk of three tokens in a projection's slice.
    fused = LOUD * torch.randn(4, (heads * GROUP + 2) * WIDTH, device=DEVICE)
    query = fused[:, : heads * GROUP * WIDTH].view(4, heads * GROUP, WIDTH)
    counts = np.array([1] * heads + [3] * heads)
    first = np.concatenate([np.arange(heads), heads + np.arange(heads)])
    lengths = np.array([40, 33, 64, 40, 50, 97])[: 2 * heads].astype(np.int32)
    table = cache.table[[0, 0, 2, 4, 4, 4][: 2 * heads]]
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    rows = cache.device.plan_rows(RowShapes(heads, starts, lengths, first))
    out = torch.full((4, heads * GROUP, WIDTH), float("nan"), device=DEVICE)
    what = query, cache.pool, rows, table, SCALE, out, form, positions
    cache.device.attend(*what)
    by_head = query.reshape(4, heads, GROUP, WIDTH)
    asked = torch.cat([by_head[0], by_head[1:].transpose(0, 1).flatten(0, 1)])
    scores = RowScores(form, torch.from_numpy(first).to(DEVICE), positions)
    expected = reference.row_attention(
        asked.double(), cache.pool.double(), rows.query_start, rows.seq_lens, table,
        SCALE, scores,
    )  # fmt: skip
    found = out.view_as(by_head)
    found = torch.cat([found[0], found[1:].transpose(0, 1).flatten(0, 1)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert cache.device.supports(form)


def test_slopes_without_positions_are_refused() -> None:
    case = make_case([(1, 9)], head_size=64)
    scores = RowScores(ScoreForm(alibi_slopes=torch.ones(4)), case.query_start)
    with pytest.raises(ValueError, match="positions"):
        case.run(1, scores=scores)
