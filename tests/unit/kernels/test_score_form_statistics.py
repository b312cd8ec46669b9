# SPDX-License-Identifier: Apache-2.0
"""What tokens draw where a model has sinks, a cap or slopes, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvserve.kernels import native, reference, statistics
from kvserve.kernels.score_form import Positions, RowScores, ScoreForm
from kvserve.kernels.statistics import CachedRows
from tests.unit.score_forms import (
    FORMS,
    LAST,
    LOUD,
    make_form,
    scattered_positions,
    weights,
)

SIZE, WIDTH, SCALE = 32, 64, 0.125
LENGTHS = [9, 1, 32, 33, 97, 300]
forms = pytest.mark.parametrize("parts", FORMS)
groups = pytest.mark.parametrize("group", [1, 3, 8])
types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    assert native.library() is not None


@forms
@groups
@types
@pytest.mark.parametrize(
    "attention_mass", [statistics.attention_mass, native.attention_mass]
)
def test_mass_of_prompts(
    attention_mass: Any, parts: str, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(group)
    kv_heads, queries, keys = 2, 70, 300
    form = make_form(parts, kv_heads * group)
    query = (LOUD * torch.randn(queries, kv_heads * group, WIDTH)).to(dtype)
    key = torch.randn(kv_heads, keys, WIDTH).to(dtype)
    found = attention_mass(query.transpose(0, 1), key, SCALE, form)
    wanted = torch.zeros(kv_heads, keys, dtype=torch.float64)
    for head in range(kv_heads * group):
        for index in range(queries):
            seen = keys - queries + index + 1
            distance = torch.arange(seen) - (seen - 1)
            what = query[index, head], key[head // group, :seen], SCALE
            wanted[head // group, :seen] += weights(*what, form, head, distance)
    torch.testing.assert_close(found, wanted.float(), rtol=2e-5, atol=1e-5)


class Decode:
    """Rows of one query, ``(token, KV head)``, of which the first is not meant."""

    def __init__(self, group: int, dtype: torch.dtype) -> None:
        width = -(-max(LENGTHS) // SIZE)
        self.pages = len(LENGTHS) * width + 3
        order = torch.randperm(self.pages, dtype=torch.int32)[: len(LENGTHS) * width]
        self.table = order.view(len(LENGTHS), width)
        meant = torch.arange(1, len(LENGTHS))
        self.cached = CachedRows(self.table, torch.tensor(LENGTHS), meant, SIZE)
        self.key = torch.randn(self.pages, SIZE, WIDTH).to(dtype)
        self.query = (LOUD * torch.randn(len(LENGTHS), group, WIDTH)).to(dtype)
        self.slots, self.of_rows = scattered_positions(
            self.table, LENGTHS, 1, self.pages, SIZE
        )
        own = torch.full((len(LENGTHS) // 2,), LAST, dtype=torch.int32)
        self.positions = Positions(self.slots, own)

    def wanted(self, form: ScoreForm) -> Tensor:
        """Mass of every slot."""
        mass = torch.zeros(self.pages, SIZE, dtype=torch.float64)
        group = self.query.shape[1]
        for row, length in enumerate(LENGTHS[1:], start=1):
            token = torch.arange(length)
            page, place = self.table[row, token // SIZE].long(), token % SIZE
            for head, query in enumerate(self.query[row]):
                what = query, self.key[page, place], SCALE, form
                distance = self.of_rows[row] - LAST
                mass[page, place] += weights(*what, row % 2 * group + head, distance)
        return mass


@forms
@groups
@types
def test_what_a_decode_draws(parts: str, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(group)
    form, case = make_form(parts, 2 * group), Decode(group, dtype)
    wanted = case.wanted(form).float()
    plain, found = torch.zeros(2, case.pages, SIZE)
    what = case.cached, SCALE
    keys = case.key[case.cached.pages()]
    statistics.add_row_attention(case.query, keys, *what, plain, form, case.positions)
    torch.testing.assert_close(plain, wanted, rtol=2e-5, atol=1e-5)
    pool = torch.stack([case.key.transpose(1, 2).flatten(1)] * 2, dim=1).contiguous()
    native.add_row_attention(case.query, pool, None, *what, found, form, case.positions)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-5)


@forms
@groups
def test_the_reference(parts: str, group: int) -> None:
    torch.manual_seed(group)
    form, case = make_form(parts, 2 * group), Decode(group, torch.float64)
    values = torch.randn_like(case.key)
    pool = torch.cat([case.key, values], dim=-1)[:, None]
    # Behind the decodes a chunk of three, of the second KV head's third token.
    query = torch.cat([case.query, case.query[:3]])
    starts = torch.tensor([*range(len(LENGTHS) + 1), len(LENGTHS) + 3]).int()
    lengths, table = torch.tensor([*LENGTHS, 300]).int(), case.table[[*range(6), 5]]
    first = torch.tensor([*range(len(LENGTHS)), 3 * 2 + 1])
    own = torch.tensor([LAST] * 3 + [LAST, LAST + 1, LAST + 2]).int()
    scores = RowScores(form, first, Positions(case.slots, own))
    rows = starts, lengths, table, SCALE
    found = reference.row_attention(query, pool, *rows, scores)
    drawn = torch.zeros(case.pages, SIZE, dtype=torch.float64)
    reference.add_row_mass(query, pool, *rows, drawn, scores)
    meant = case.table[1:].unique().long()
    torch.testing.assert_close(drawn[meant], case.wanted(form)[meant])
    for row, (length, asked) in enumerate(
        zip(lengths.tolist(), [*range(6), 8], strict=True)
    ):
        token = torch.arange(length)
        page, place = table[row, token // SIZE].long(), token % SIZE
        distance = case.slots[page, place] - (LAST if row < 6 else LAST + 2)
        for head, each in enumerate(query[asked]):
            number = int(first[row]) % 2 * group + head
            what = each, case.key[page, place], SCALE, form, number, distance
            torch.testing.assert_close(
                found[asked, head], weights(*what) @ values[page, place]
            )
