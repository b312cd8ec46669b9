# SPDX-License-Identifier: Apache-2.0
"""Rows with a hole in their keys, in the CPU's kernels, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.kernels import native
from kvserve.kernels.score_form import Positions, ScoreForm
from tests.unit.kernels.test_score_forms import (
    ERROR,
    PAGE,
    SCALE,
    WIDTH,
    Rows,
    worst_error,
)
from tests.unit.score_forms import FORMS, LAST, LOUD, WINDOWS, make_form
from tests.unit.strewn_pages import STORED

pytestmark = pytest.mark.skipif(
    not native.can_attend(torch.float32, 64, 32), reason="needs a C++ compiler"
)
Gap = tuple[int, int]
HEADS = 2
# Of pages, of what is softened together in decode and in prompts, and of whole rows.
EDGES = [0, 1, 31, 32, 33, 95, 96, 97, 191, 192, 255, 256, 257, 512]
FORM_PARTS = ["", *FORMS, *WINDOWS]


@st.composite
def gaps(draw: st.DrawFn, length: int) -> Gap:
    """Any gap of a row, most often one that begins or ends where kernels cut."""
    ends = st.sampled_from(EDGES) | st.integers(0, length)
    first, last = sorted(min(draw(ends), length) for _ in range(2))
    return first, last


@st.composite
def rows_of_one(draw: st.DrawFn) -> tuple[list[int], list[Gap]]:
    """Lengths and gaps of rows of one query, a text's KV heads in turns."""
    lengths = draw(st.lists(st.integers(0, 520), min_size=1, max_size=3))
    lengths = [length for length in lengths for _ in range(HEADS)]
    return lengths, [draw(gaps(length)) for length in lengths]


def types() -> st.SearchStrategy[tuple[torch.dtype, str]]:
    """Types of queries and pages."""
    return st.tuples(st.sampled_from([*ERROR]), st.sampled_from([*STORED]))


def as_rows(each: list[Gap]) -> Tensor:
    return torch.tensor(each, dtype=torch.int32)


def check_decode(
    lengths: list[int],
    hidden: list[Gap],
    parts: str,
    group: int,
    dtype: torch.dtype = torch.float32,
    stored: str = "float32",
) -> None:
    """Attend to rows of random keys, each of whose queries sees none of its gap."""
    form, rows = make_form(parts, HEADS * group), Rows(lengths, dtype, stored)
    query = (LOUD * torch.randn(len(lengths), group, WIDTH)).to(dtype)
    own = torch.full((len(lengths) // HEADS,), LAST, dtype=torch.int32)
    out = torch.full_like(query, torch.nan)
    native.decode_attention(
        query, rows.pool, rows.lengths, rows.table, SCALE, out, form,
        Positions(rows.slots, own), as_rows(hidden),
    )  # fmt: skip
    wanted = [
        rows.wanted(row, each, seen, form, row % HEADS * group + head, hidden[row])
        for row, seen in enumerate(lengths)
        for head, each in enumerate(query[row])
    ]
    assert worst_error(out.flatten(0, 1), torch.stack(wanted)) < ERROR[dtype]


@settings(max_examples=150)
@given(
    rows_of_one(),
    types(),
    st.sampled_from(FORM_PARTS),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 99),
)
def test_a_step_of_decode_sees_nothing_of_a_gap(
    rows: tuple[list[int], list[Gap]],
    kind: tuple[torch.dtype, str],
    parts: str,
    group: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    check_decode(*rows, parts, group, *kind)


@pytest.mark.parametrize("parts", ["", "sinks"])
def test_gaps_may_hide_whole_parts_of_long_rows(parts: str) -> None:
    torch.manual_seed(0)
    hidden = [(0, 0), (1000, 2300), (0, 2300), (1, 4099), (0, 4099), (4098, 4099)]
    check_decode([4099] * len(hidden), hidden, parts, group=3)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[Gap]]:
    """Queries and keys of each row, head-major; each has a gap of its own."""
    sizes = st.tuples(st.integers(1, 70), st.integers(0, 450))
    drawn = draw(st.lists(sizes, min_size=1, max_size=2))
    rows = [(count, count + more) for count, more in drawn] * HEADS
    return rows, [draw(gaps(length)) for _, length in rows]


@settings(max_examples=150)
@given(
    prompts(),
    types(),
    st.sampled_from(FORM_PARTS),
    st.sampled_from([1, 3]),
    st.integers(0, 99),
)
def test_no_query_of_a_prompt_sees_a_gap(
    prompts: tuple[list[tuple[int, int]], list[Gap]],
    kind: tuple[torch.dtype, str],
    parts: str,
    group: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    (sizes, hidden), dtype = prompts, kind[0]
    counts, lengths = zip(*sizes, strict=True)
    form = make_form(parts, HEADS * group)
    rows = Rows(list(lengths), *kind, recent=max(counts))
    chunks = len(sizes) // HEADS
    starts = np.cumsum([0, *counts[:chunks]])
    query = (LOUD * torch.randn(starts[-1], HEADS, group, WIDTH)).to(dtype)
    own = [LAST + 1 - torch.arange(count, 0, -1).int() for count in counts[:chunks]]
    first = [start * HEADS + head for head in range(HEADS) for start in starts[:-1]]
    out = torch.full_like(query, torch.nan)
    native.prefill_attention(
        query, rows.pool, torch.tensor(first), torch.tensor(counts).int(),
        rows.lengths, rows.table, SCALE, out, form,
        Positions(rows.slots, torch.cat(own)), as_rows(hidden),
    )  # fmt: skip
    for row, (count, length) in enumerate(sizes):
        kv_head, token = row // chunks, int(starts[row % chunks])
        for index in {0, count // 2, count - 1}:
            seen = length - count + 1 + index
            wanted = [
                rows.wanted(row, each, seen, form, kv_head * group + head, hidden[row])
                for head, each in enumerate(query[token + index, kv_head])
            ]
            found = out[token + index, kv_head]
            assert worst_error(found, torch.stack(wanted)) < ERROR[dtype]


def test_a_query_that_a_gap_leaves_nothing_gets_zeros() -> None:
    rows = Rows([50, 50], torch.float32, "float32")
    query = torch.randn(2, 3, WIDTH)
    out = torch.full_like(query, torch.nan)
    what = query, rows.pool, rows.lengths, rows.table, SCALE, out
    native.decode_attention(*what, gaps=as_rows([(0, 50), (0, 49)]))
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], rows.values[1][49].expand(3, -1))


def test_gaps_without_keys_change_nothing() -> None:
    rows = Rows([700, 31], torch.float32, "float32")
    query = torch.randn(2, 3, WIDTH)
    found = [torch.empty_like(query), torch.empty_like(query)]
    for out, hidden in zip(found, [None, as_rows([(0, 0), (20, 20)])], strict=True):
        what = query, rows.pool, rows.lengths, rows.table, SCALE, out
        native.decode_attention(*what, gaps=hidden)
    assert torch.equal(*found)


def test_keys_in_a_gap_may_be_no_numbers() -> None:
    rows = Rows([80], torch.float32, "float32")
    query, hidden = torch.randn(1, 3, WIDTH), as_rows([(40, 64)])
    found = []
    for _ in range(2):
        out = torch.empty_like(query)
        what = query, rows.pool, rows.lengths, rows.table, SCALE, out
        native.decode_attention(*what, gaps=hidden)
        found.append(out)
        keys = rows.pool[rows.table[0, 1]].view(2, WIDTH, PAGE)[0]
        keys[:, 8:] = torch.nan
    assert torch.equal(*found)


def test_gaps_that_do_not_fit_their_rows_are_refused() -> None:
    rows = Rows([80, 80], torch.float32, "float32")
    query = torch.randn(2, 3, WIDTH)
    what = query, rows.pool, rows.lengths, rows.table, SCALE, torch.empty_like(query)
    fits = torch.zeros(2, 2, dtype=torch.int32)
    native.decode_attention(*what, gaps=fits)
    for hidden in (fits.long(), fits[:1], fits.flatten(), torch.cat([fits] * 2).T[:2]):
        with pytest.raises(ValueError, match="kernels take"):
            native.decode_attention(*what, gaps=hidden)


def test_the_device_gives_each_row_of_a_mixed_step_its_gap() -> None:
    torch.manual_seed(0)
    group, hidden = 3, [(32, 38), (0, 0), (33, 64)]
    device = CPUDevice(torch.float32, group, WIDTH, PAGE)
    assert device.supports_gaps
    # Two decodes, and behind them a chunk of four.
    lengths = [40, 70, 100]
    rows = Rows(lengths, torch.float32, "float32")
    shapes = RowShapes(
        2,
        np.array([0, 1, 2, 6], dtype=np.int32),
        np.array(lengths, dtype=np.int32),
        np.arange(3),
        np.array(hidden, dtype=np.int32),
    )
    query = torch.randn(6, group, WIDTH)
    out = torch.full_like(query, torch.nan)
    planned = device.plan_rows(shapes)
    device.attend(query, rows.pool, planned, rows.table, SCALE, out)
    for token, seen in enumerate([40, 70, 97, 98, 99, 100]):
        row = min(token, 2)
        wanted = [
            rows.wanted(row, each, seen, ScoreForm(), 0, hidden[row])
            for each in query[token]
        ]
        assert worst_error(out[token], torch.stack(wanted)) < 1e-5


def test_vllms_kernel_takes_no_gaps() -> None:
    device = CPUDevice(torch.float16, 3, WIDTH, PAGE)
    assert not device.supports_gaps
    one = np.ones(1, dtype=np.int32)
    shapes = RowShapes(
        1, np.arange(2, dtype=np.int32), one, np.arange(1), np.zeros((1, 2), np.int32)
    )
    query = torch.zeros(1, 3, WIDTH, dtype=torch.float16)
    pool = torch.zeros(1, 1, PAGE, 2 * WIDTH, dtype=torch.float16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError):
        device.attend(query, pool, device.plan_rows(shapes), table, 1.0, query.clone())
