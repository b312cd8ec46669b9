# SPDX-License-Identifier: Apache-2.0
"""Sinks, soft caps and slopes in the CPU's kernels of attention, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.kernels import native
from kvserve.kernels.score_form import Positions, ScoreForm
from tests.unit.score_forms import (
    FORMS,
    LAST,
    LOUD,
    WINDOWS,
    make_form,
    scattered_positions,
    weights,
)
from tests.unit.strewn_pages import STORED, put_on_page, trapped_pool

pytestmark = pytest.mark.skipif(
    not native.can_attend(torch.float32, 64, 32), reason="needs a C++ compiler"
)
PAGE, WIDTH = 32, 64
SCALE = WIDTH**-0.5
ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
forms = pytest.mark.parametrize("parts", FORMS + WINDOWS)
types = pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "int8_per_token_head"),
    ],
    ids=["float32", "bfloat16", "int8"],
)


class Rows:
    """Rows of random keys on strewn pages, each of a KV head and a text of its own."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, stored: str, recent: int = 1
    ) -> None:
        kind = STORED[stored]
        counts = [-(-length // PAGE) for length in lengths]
        self.lengths = torch.tensor(lengths).int()
        pages = sum(counts) + 1
        self.pool = trapped_pool(kind, pages, PAGE, WIDTH)
        self.table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
        free = iter((torch.randperm(sum(counts)) + 1).tolist())
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            keys, values = torch.randn(2, length, WIDTH).to(dtype)
            for place, first in enumerate(range(0, length, PAGE)):
                self.table[row, place] = page = next(free)
                own = slice(first, first + PAGE)
                put_on_page(kind, self.pool[page], keys[own], values[own])
            self.keys.append(kind.round_trip(keys))
            self.values.append(kind.round_trip(values))
        self.slots, self.positions = scattered_positions(
            self.table, lengths, recent, pages, PAGE
        )

    def drawn(
        self,
        row: int,
        query: Tensor,
        seen: int,
        form: ScoreForm,
        head: int,
        gap: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """What ``query [d]`` of key ``seen`` gives a row's keys so far."""
        before = len(self.keys[row]) - seen
        distance = self.positions[row][:seen] - (LAST - before)
        keys = self.keys[row][:seen]
        return weights(query, keys, SCALE, form, head, distance, gap)

    def wanted(
        self,
        row: int,
        query: Tensor,
        seen: int,
        form: ScoreForm,
        head: int,
        gap: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """What it gets."""
        values = self.values[row][:seen].double()
        return self.drawn(row, query, seen, form, head, gap) @ values


def worst_error(out: Tensor, wanted: Tensor) -> float:
    sizes = wanted.norm(dim=-1).clamp(min=0.05)
    return float(((out.double() - wanted).norm(dim=-1) / sizes).max())


# A text's rows one behind the other, a KV head each: nothing at all, a page and its
# edges, what is softened together, and what is cut into parts.
DECODES = [1, 0, 31, 33, 97, 128, 700, 4099]


@forms
@types
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode(parts: str, dtype: torch.dtype, stored: str, group: int) -> None:
    torch.manual_seed(group)
    form = make_form(parts, 2 * group)
    rows = Rows(DECODES, dtype, stored)
    query = (LOUD * torch.randn(len(rows.keys), group, WIDTH)).to(dtype)
    own = torch.full((len(DECODES) // 2,), LAST, dtype=torch.int32)
    out = torch.full_like(query, torch.nan)
    native.decode_attention(
        query, rows.pool, rows.lengths, rows.table, SCALE, out, form,
        Positions(rows.slots, own),
    )  # fmt: skip
    wanted = torch.stack(
        [
            rows.wanted(row, each, len(rows.keys[row]), form, row % 2 * group + head)
            for row, heads in enumerate(query)
            for head, each in enumerate(heads)
        ]
    )
    assert worst_error(out.flatten(0, 1), wanted) < ERROR[dtype]


# Queries and keys: a whole prompt, a late chunk, a block of a bounded head, one query.
PROMPTS = [(70, 70), (40, 300), (32, 96), (1, 200)]


@forms
@types
@pytest.mark.parametrize("group", [1, 3, 8])
def test_prompts(parts: str, dtype: torch.dtype, stored: str, group: int) -> None:
    torch.manual_seed(group)
    kv_heads = 2
    form = make_form(parts, kv_heads * group)
    # Rows are head-major.
    counts, lengths = zip(*PROMPTS * kv_heads, strict=True)
    rows = Rows(list(lengths), dtype, stored, recent=max(counts))
    tokens = np.cumsum([0, *counts[: len(PROMPTS)]])
    shape = tokens[-1], kv_heads, group, WIDTH
    query = (LOUD * torch.randn(shape)).to(dtype)
    own = torch.cat([LAST + 1 - torch.arange(n, 0, -1).int() for n, _ in PROMPTS])
    first = torch.cat(
        [torch.from_numpy(tokens[:-1]) * kv_heads + head for head in range(kv_heads)]
    )
    out = torch.full_like(query, torch.nan)
    native.prefill_attention(
        query, rows.pool, first, torch.tensor(counts).int(), rows.lengths, rows.table,
        SCALE, out, form, Positions(rows.slots, own),
    )  # fmt: skip
    for row, (count, length) in enumerate(PROMPTS * kv_heads):
        kv_head, token = row // len(PROMPTS), int(tokens[row % len(PROMPTS)])
        for index in {0, count // 2, count - 1}:
            seen = length - count + 1 + index
            found = out[token + index, kv_head]
            wanted = [
                rows.wanted(row, each, seen, form, kv_head * group + head)
                for head, each in enumerate(query[token + index, kv_head])
            ]
            assert worst_error(found, torch.stack(wanted)) < ERROR[dtype]


def test_queries_of_one_kv_head_may_lie_in_a_fused_projection() -> None:
    torch.manual_seed(0)
    group, form = 5, make_form("sinks cap slopes", 5)
    device = CPUDevice(torch.float32, group, WIDTH, PAGE)
    # Two decodes, and behind them a chunk of four.
    rows = Rows([40, 70, 100], torch.float32, "float32", recent=4)
    shapes = RowShapes(
        2,
        np.array([0, 1, 2, 6], dtype=np.int32),
        np.array([40, 70, 100], dtype=np.int32),
        np.array([0, 1, 2]),
    )
    fused = LOUD * torch.randn(6, (group + 2) * WIDTH)
    query = fused[:, : group * WIDTH].view(6, group, WIDTH)
    assert not query.is_contiguous()
    own = LAST - torch.tensor([0, 0, 3, 2, 1, 0]).int()
    for decodes in (2, 6):
        out = torch.zeros(6, group, WIDTH)
        planned = device.plan_rows(shapes)
        if decodes == 6:  # the same chunk, as four rows of one query
            planned = device.plan_rows(
                RowShapes(
                    6,
                    np.arange(7, dtype=np.int32),
                    np.array([40, 70, 97, 98, 99, 100], dtype=np.int32),
                    np.arange(6),
                )
            )
        table = rows.table[[0, 1, *[2] * (decodes - 1)][: len(planned.seq_lens)]]
        device.attend(
            query, rows.pool, planned, table, SCALE, out, form,
            Positions(rows.slots, own),
        )  # fmt: skip
        for token, seen in enumerate([40, 70, 97, 98, 99, 100]):
            wanted = [
                rows.wanted(min(token, 2), each, seen, form, head)
                for head, each in enumerate(query[token])
            ]
            assert worst_error(out[token], torch.stack(wanted)) < 1e-5


def test_a_sink_far_above_all_logits_leaves_nothing() -> None:
    rows = Rows([50], torch.float32, "float32")
    query, out = torch.randn(1, 1, WIDTH), torch.empty(1, 1, WIDTH)
    what = query, rows.pool, rows.lengths, rows.table, SCALE, out
    native.decode_attention(*what, ScoreForm(sink_logits=torch.tensor([300.0])))
    assert (out == 0).all()
    plain = torch.empty_like(out)
    native.decode_attention(*what[:-1], plain)
    native.decode_attention(*what, ScoreForm(sink_logits=torch.tensor([-torch.inf])))
    assert torch.equal(out, plain)


def test_what_is_refused() -> None:
    rows = Rows([50], torch.float32, "float32")
    query = torch.randn(1, 2, WIDTH)
    what = query, rows.pool, rows.lengths, rows.table, SCALE, torch.empty_like(query)
    slopes = ScoreForm(alibi_slopes=torch.ones(2))
    own = torch.zeros(1, dtype=torch.int32)
    for form, positions in [
        (slopes, None),
        (slopes, Positions(rows.slots.long(), own)),
        (slopes, Positions(rows.slots[1:], own)),
        (slopes, Positions(rows.slots, own[:0])),
        (ScoreForm(sink_logits=torch.ones(4)), None),
        (ScoreForm(sink_logits=torch.ones(3)), None),
    ]:
        with pytest.raises(ValueError, match=r"kernels take|in groups of"):
            native.decode_attention(*what, form, positions)
    for parts in (
        {"soft_cap": -1.0},
        {"soft_cap": float("nan")},
        {"sink_logits": torch.ones(2).bfloat16()},
        {"sink_logits": torch.ones(2, 1)},
        {"sink_logits": torch.ones(2), "alibi_slopes": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match=r"cap|float32|each query head"):
            ScoreForm(**parts)  # type: ignore[arg-type]


def test_vllms_kernel_takes_a_cap_and_no_more() -> None:
    torch.manual_seed(0)
    group, keys = 3, 70
    device = CPUDevice(torch.float16, group, WIDTH, PAGE)
    capped = make_form("cap", 2 * group)
    assert device.supports(ScoreForm())
    assert device.supports(capped)
    pool = torch.zeros(7, 1, PAGE, 2 * WIDTH, dtype=torch.float16)
    table = (1 + torch.arange(6)).view(2, 3).int()
    slots = (table.long()[..., None] * PAGE + torch.arange(PAGE)).flatten(1)[:, :keys]
    key, value = torch.randn(2, 2, keys, WIDTH).half()
    device.write(key.flatten(0, 1), value.flatten(0, 1), pool, slots.flatten())
    starts, lengths = np.arange(3, dtype=np.int32), np.full(2, keys, dtype=np.int32)
    rows = device.plan_rows(RowShapes(2, starts, lengths, np.arange(2)))
    query = LOUD * torch.randn(1, 2 * group, WIDTH).half()
    out = torch.empty_like(query)
    what = query, pool, rows, table, SCALE, out
    device.attend(*what, capped)
    wanted = [
        weights(each, key[head // group], SCALE, capped, head)
        @ value[head // group].double()
        for head, each in enumerate(query[0])
    ]
    assert worst_error(out[0], torch.stack(wanted)) < 5e-3
    for parts in ("sinks", "slopes", "sinks cap slopes"):
        form = make_form(parts, 2 * group)
        assert not device.supports(form)
        assert CPUDevice(torch.float32, group, WIDTH, PAGE).supports(form)
        with pytest.raises(NotImplementedError):
            device.attend(*what, form)
