# SPDX-License-Identifier: Apache-2.0
"""What heads keep of their history: profiles, and budgets made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from policies.base import ModelShape
from policies.history import (
    HISTORY_FORMAT,
    Shares,
    keeps_within,
    load_shares,
)
from policies.keydiff import KeyDiff

MODEL = ModelShape("toy", 2, 6, 3, 8, max_tokens=4096)
SHARES = [
    [[0.0, 0.01, 0.02], [0.0, 0.03, 0.3]],
    [[0.0, 0.05, 0.1], [0.01, 0.1, 0.9]],
]


def write(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps({"format": HISTORY_FORMAT, "shares": SHARES} | changes))
    return str(path)


@st.composite
def ladders(draw: st.DrawFn) -> Shares:
    """Shares that grow from level to level, with both ends."""
    layers, heads, levels = (draw(st.integers(1, 3)) for _ in range(3))
    share = st.floats(0, 1)
    columns = [
        [0.0, *sorted(draw(st.lists(share, min_size=levels, max_size=levels))), 1.0]
        for _ in range(layers * heads)
    ]
    return tuple(
        tuple(
            tuple(columns[layer * heads + head][level] for head in range(heads))
            for layer in range(layers)
        )
        for level in range(levels + 2)
    )


@given(ladders(), st.sampled_from([16, 128]), st.floats(0, 1), st.floats(0, 1))
def test_heads_keep_no_more_than_asked_and_never_less_of_more(
    shares: Shares, group: int, one: float, other: float
) -> None:
    heads = sum(map(len, shares[0]))
    totals = sorted(int(part * group * heads) for part in (one, other))
    less, more = (
        [keep for layer in keeps_within(shares, group, total) for keep in layer]
        for total in totals
    )
    assert sum(less) <= totals[0]
    assert sum(more) <= totals[1]
    assert all(0 <= a <= b <= group for a, b in zip(less, more, strict=True))
    whole = keeps_within(shares, group, group * heads)
    assert whole == ((group,) * len(shares[0][0]),) * len(shares[0])


@given(
    st.floats(0.0, 1.0),
    st.integers(256, 1 << 17),
    st.floats(0.0, 0.5),
    st.sampled_from([32, 128]),
    st.sampled_from([128, 480]),
)
def test_held_tokens_stay_within_the_budget_at_every_length(
    budget: float, length: int, more: float, group: int, recent: int
) -> None:
    policy = KeyDiff(budget=budget, group=group, recent=recent)
    groups = policy.groups(length)
    floor = length - groups * group
    if budget * length < floor:
        with pytest.raises(UserError, match=f"^--policy-arg budget={budget}: "):
            policy.budgets(MODEL, length)
        return
    heads = [head for layer in policy.budgets(MODEL, length) for head in layer]
    held = [floor + groups * head.keep for head in heads]
    assert sum(held) <= budget * length * len(heads) * (1 + 1e-6)
    larger = replace(policy, budget=min(budget + more, 1.0)).budgets(MODEL, length)
    keeps = [head.keep for layer in larger for head in layer]
    assert all(a.keep <= keep for a, keep in zip(heads, keeps, strict=True))


def test_the_least_budget_that_is_named_is_taken() -> None:
    with pytest.raises(UserError) as caught:
        KeyDiff(budget=0.02).budgets(MODEL, 4096)
    message = str(caught.value)
    assert "\n" not in message
    least = float(message.split("at least ")[1].split(",")[0])
    assert least == pytest.approx(128 / 4096, abs=0.001)
    budgets = KeyDiff(budget=least).budgets(MODEL, 4096)
    assert {head.keep for layer in budgets for head in layer} == {0}


def test_heads_that_need_more_keep_more(tmp_path: Path) -> None:
    policy = KeyDiff(budget=0.25, profile=write(tmp_path / "history.json"))
    keeps = [[head.keep for head in layer] for layer in policy.budgets(MODEL, 4096)]
    assert keeps[1][2] > 100
    assert keeps[0][0] < 5
    assert keeps[0][0] <= keeps[0][1] <= keeps[0][2] <= keeps[1][2]
    assert "profile" in policy.files("toy")
    assert "on average" in policy.remark(MODEL)


def test_without_a_profile_all_heads_keep_as_much_and_the_server_says_so() -> None:
    policy = KeyDiff(budget=0.25)
    keeps = {head.keep for layer in policy.budgets(MODEL, 4096) for head in layer}
    assert len(keeps) == 1
    assert "kvserve profile scorer MODEL" in policy.remark(MODEL)
    assert policy.files("toy") == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other/1"}, "malformed"),
        ({"shares": [[[0.1, 2.0, 0.1]] * 2]}, "malformed"),
        ({"shares": [[[0.1, None, 0.1]] * 2]}, "malformed"),
        ({"shares": [[[0.1, 10**400, 0.1]] * 2]}, "malformed"),
        ({"shares": [[[0.1, "nan", 0.1]] * 2]}, "malformed"),
        ({"shares": SHARES[::-1]}, "malformed"),
        ({"shares": [[[0.1, 0.1, 0.1]]]}, "another model: 1 layers x 3 KV heads"),
        ({"shares": [[[0.1, 0.1]] * 2]}, "another model: 2 layers x 2 KV heads"),
        ({"shares": []}, "another model: no layers x no KV heads"),
    ],
)
def test_files_of_others_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / f"{len(said)}{len(str(changes))}.json", **changes)
    with pytest.raises(UserError) as caught:
        load_shares(path, MODEL)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    with pytest.raises(UserError, match="cannot be read"):
        load_shares(str(tmp_path / "none.json"), MODEL)


def test_a_model_with_layers_of_its_own_takes_the_rows_that_are_open(
    tmp_path: Path,
) -> None:
    shape = ModelShape("toy", 1, 6, 3, 8, chosen=(1,), all_layers=2)
    shares = load_shares(write(tmp_path / "history.json"), shape)
    assert shares is not None
    assert shares[1] == ((0.0, 0.03, 0.3),)
