# SPDX-License-Identifier: Apache-2.0
"""Spans of tokens that requests have protected: how they are read, and what they do."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan.protection import (
    MOST_SPANS,
    parse_spans,
    protecting,
    spans_in_words,
)
from kvserve.plan.request_policies import rule_of_request
from kvserve.plan.rule import Rule
from kvserve.plan.streaming import StreamRule
from policies.base import StreamingPolicy
from policies.full import Full
from policies.keydiff import KeyDiff
from policies.sink_recent import SinkRecent
from tests.unit.served_rules import ALONE, RULE, under

SPANS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 60)).map(lambda s: (s[0], sum(s))),
    min_size=1,
    max_size=MOST_SPANS,
)


def written(spans: list[tuple[int, int]]) -> str:
    return ",".join(f"{first}-{behind}" for first, behind in spans)


def of(policy: StreamingPolicy) -> StreamRule:
    return dataclasses.replace(ALONE, policy=policy)


def asking(policy: StreamingPolicy, spans: object, **extra: Any) -> Rule | None:
    """The rule of a request, at a server that protects and mixes."""
    params = SimpleNamespace(extra_args={"kv_protect": spans, **extra})
    server = dataclasses.replace(under(policy), protects=True)
    return rule_of_request(server, params, 1000)


@given(SPANS)
def test_spans_are_in_order_apart_and_the_same_tokens(
    spans: list[tuple[int, int]],
) -> None:
    found = parse_spans(written(spans))
    for (_, behind), (first, _) in pairwise(found):
        assert behind < first
    tokens = {token for first, behind in spans for token in range(first, behind)}
    assert [t for first, behind in found for t in range(first, behind)] == sorted(
        tokens
    )
    assert parse_spans(written([*found])) == found


@given(SPANS)
def test_what_a_request_had_protected_reads_as_it_is_asked_for(
    spans: list[tuple[int, int]],
) -> None:
    found = parse_spans(written(spans))
    assert spans_in_words(protecting(of(KeyDiff()), found)) == written([*found])


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("0-1", ((0, 1),)),
        ("0-200,950-1000", ((0, 200), (950, 1000))),
        ("950-1000,0-200", ((0, 200), (950, 1000))),
        ("0-10,10-20", ((0, 20),)),
        ("0-100,5-6", ((0, 100),)),
        ("0-999999999", ((0, 999_999_999),)),
    ],
)
def test_spans_are_read(text: str, spans: tuple[tuple[int, int], ...]) -> None:
    assert parse_spans(text) == spans


@pytest.mark.parametrize(
    ("said", "message"),
    [
        *((said, "expected `system`, or at most 64 spans") for said in (5, 0, 1.5, "")),
        *((said, "expected `system`") for said in ([], ["0-5"], [0, 5], {"a": 1})),
        *((said, "expected `system`") for said in ("a-b", "0-", "-5", "0-5,", "0 - 5")),
        *((said, "expected `system`") for said in ("System", "0-1000000000", "0-٣")),
        (written([(2 * n, 2 * n + 1) for n in range(65)]), "at most 64"),
        ("0-5," * 1_000_000, "at most 64"),
        ("5-5", "5-5: is empty"),
        ("7-5", "7-5: is empty"),
        ("system", "`system` is for chats"),
    ],
)
def test_whatever_else_is_said_is_refused_in_a_line(said: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_spans(said)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_first_tokens_stay_in_every_head_and_others_go_last() -> None:
    plain = of(KeyDiff()).plan(1000)
    rule = asking(KeyDiff(), "0-100,500-600")
    assert isinstance(rule, StreamRule)
    assert (rule.protected, rule.spans) == (100, ((500, 600),))
    assert rule.plan(1000).spans == ((500, 600),)
    assert (rule.plan(1000).lane_tokens(1000) >= plain.lane_tokens(1000)).all()
    # Spans that do not begin at 0 cost nothing.
    same = asking(KeyDiff(), "500-600")
    assert same is not None
    assert same.pages(1000) == of(KeyDiff()).pages(1000)


def test_a_policy_of_positions_protects_first_tokens_alone() -> None:
    policy = SinkRecent(32, 96)
    rule = asking(policy, "0-64")
    assert rule is not None
    assert rule.plan(1000) == of(SinkRecent(64, 96)).plan(1000)
    assert asking(policy, "0-20") is not None
    for spans in ("5-20", "0-20,30-40"):
        with pytest.raises(UserError, match="can protect a span that begins at 0"):
            asking(policy, spans)


def test_a_policy_that_keeps_everything_takes_any_spans() -> None:
    for spans in ("0-64", "5-20", "0-999999999"):
        rule = asking(Full(), spans)
        assert rule is not None
        assert rule.plan(1000) == ALONE.plan(1000)
    assert spans_in_words(RULE) == spans_in_words(ALONE) == ""


def test_more_than_a_request_can_have_is_as_much_as_it_can() -> None:
    rule = asking(SinkRecent(32, 96), "0-999999999")
    assert isinstance(rule, StreamRule)
    assert rule.protected == ALONE.max_tokens
    assert (rule.plan(1000).lane_tokens(1000) == 1000).all()


def test_a_policy_of_the_requests_own_protects_or_says_that_it_cannot() -> None:
    rule = asking(Full(), "0-64", kv_policy="sink-recent:recent=96")
    assert isinstance(rule, StreamRule)
    assert (rule.policy, rule.protected) == (SinkRecent(32, 96), 64)
    with pytest.raises(UserError, match="policy h2o selects tokens of the whole"):
        asking(Full(), "0-64", kv_policy="h2o")


def test_servers_that_protect_nothing_make_no_rule_of_it() -> None:
    params = SimpleNamespace(extra_args={"kv_protect": "0-64"})
    assert rule_of_request(RULE, params, 1000) is None
    assert rule_of_request(ALONE, params, 1000) is None
