# SPDX-License-Identifier: Apache-2.0
"""Ranges of budgets: how they are written, and the budgets between their ends."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import rule_named
from kvserve.plan.rule import Rule, rule_under
from policies.base import Policy
from policies.budgets import PolicySpec
from policies.shares import Budget, levels_between, parse_range
from tests.unit.served_rules import MODEL, RULE

SHAPE = dataclasses.replace(MODEL, max_tokens=8192)


def create(text: str) -> tuple[Policy, ...]:
    """The policy with each budget, the largest first."""
    return tuple(level.create(SHAPE) for level in PolicySpec.parse(text).levels)


def served(text: str, ranks: int = 1) -> Rule:
    *richer, least = create(text)
    return rule_under(least, SHAPE, 32, 8192, ranks=ranks, richer=richer)


def test_a_range_is_written_from_the_largest_budget_down() -> None:
    spec = PolicySpec.parse("kvzap:budget=50%..12.5%,recent=64")
    assert (spec.budget, spec.least) == (Budget(share=0.5), Budget(share=0.125))
    assert [str(level.budget) for level in spec.levels] == [
        "50%",
        "35.36%",
        "25%",
        "17.68%",
        "12.5%",
    ]
    assert all(level.own == spec.own and not level.least for level in spec.levels)


def test_a_range_may_be_of_tokens_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('policy = "sink-recent"\nbudget = "1024..512"\n')
    names = [str(level.budget) for level in PolicySpec.parse(str(path)).levels]
    assert names == ["1024", "724", "512"]


def test_one_budget_is_a_range_of_one_level() -> None:
    spec = PolicySpec.parse("kvzap:budget=50%")
    assert spec.levels == (spec,)


_SHARES = st.integers(200, 10_000).map(lambda parts: Budget(share=parts / 10_000))
_TOKENS = st.integers(128, 1 << 20).map(lambda tokens: Budget(tokens=tokens))


@given(
    st.one_of(*(st.lists(kind, min_size=2, max_size=2) for kind in (_SHARES, _TOKENS)))
)
@example([Budget(share=0.5), Budget(share=0.3)])
def test_levels_fall_from_end_to_end_in_small_steps(ends: list[Budget]) -> None:
    least, largest = sorted(ends, key=lambda one: one.share_of(1 << 40))
    if least == largest:
        return
    levels = levels_between(largest, least)
    assert (levels[0], levels[-1]) == (largest, least)
    shares = [level.share_of(1 << 40) for level in levels]
    for one, next_one in pairwise(shares):
        assert one > next_one
        assert one / next_one <= 1.5


@given(st.integers(1, 40), st.integers(1, 40))
def test_levels_of_a_few_tokens_are_distinct(one: int, other: int) -> None:
    if one == other:
        return
    ends = Budget(tokens=max(one, other)), Budget(tokens=min(one, other))
    names = [str(level) for level in levels_between(*ends)]
    assert len(set(names)) == len(names)


@given(st.one_of(_SHARES, _TOKENS))
def test_a_budget_reads_what_it_is_shown_as(budget: Budget) -> None:
    read, least = parse_range(str(budget))
    assert least is None
    assert read.tokens == budget.tokens
    assert read.share == pytest.approx(budget.share)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kvzap:budget=12.5%..50%", "goes from the largest budget down to the least"),
        ("kvzap:budget=50%..50%", "goes from the largest budget down to the least"),
        ("kvzap:budget=50%..", r"give a share .* or for a server a range"),
        ("kvzap:budget=..50%", r"give a share .* or for a server a range"),
        ("kvzap:budget=50%..25%..12.5%", r"give a share .* or for a server a range"),
        ("kvzap:budget=50%..512", "give two shares, or tokens twice"),
        ("kvzap:budget=50%..0%", "budget=0"),
        ("kvzap:budget=50%..little", "budget=little: give a share"),
        ("full:budget=100%..50%", "keeps everything and takes no budget"),
        ("h2o:budget=50%..12.5%", "holds a full cache while it reads"),
        ("snapkv:budget=50%..12.5%", "holds a full cache while it reads"),
        ("sink-recent:budget=50%..0.5%", "give a larger budget"),
        ("sharded:budget=50%..12.5%", "budgets of a range count pages in turns"),
    ],
)
def test_a_range_that_cannot_be_served_is_refused_in_a_line(
    text: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        served(text)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--policy")


def test_ranks_share_the_heads_of_a_range_of_positions_alone() -> None:
    rule = served("retrieval:budget=50%..25%", ranks=3)
    assert isinstance(rule, MixedRule)
    assert [level.ranks for level in rule.levels] == [3, 3, 3]
    with pytest.raises(UserError, match=r"tensor-parallel-size=3.* kvzap"):
        served("kvzap:budget=50%..12.5%", ranks=3)


def test_a_request_names_one_budget() -> None:
    with pytest.raises(UserError, match="a range of budgets is a server's; give one"):
        rule_named(RULE, "sink-recent:budget=50%..25%", 1024)
