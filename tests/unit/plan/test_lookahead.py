# SPDX-License-Identifier: Apache-2.0
"""Plans of requests whose next tokens are guessed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.rule import rule_under
from kvserve.plan.streaming import StreamRule, scratch_pages
from policies.base import ModelShape
from policies.registry import create_policy
from policies.sink_recent import SinkRecent
from tests.reference.visibility import visible_blocks
from tests.unit.simulator import plans, thinned_plans

MODEL = ModelShape("tiny", 2, 2, 2, 8, 1024)
SINKS_AND_RECENT = SinkRecent(sinks=32, recent=64)
accepted_tokens = st.integers(1, 50)
guesses_of_a_step = st.integers(1, 20)


def guessing(plan: PagePlan, lookahead: int) -> PagePlan:
    return replace(plan, lookahead=lookahead)


@given(plans() | thinned_plans(), accepted_tokens, guesses_of_a_step)
def test_what_a_query_behind_refused_tokens_sees_is_held(
    plan: PagePlan, accepted: int, guesses: int
) -> None:
    plan = guessing(plan, guesses)
    given_back = set(plan.given_back(0, accepted).tolist())
    block = accepted // plan.page_size
    for layer, head in np.ndindex(plan.num_layers, plan.num_kv_heads):
        seen = np.array(visible_blocks(plan, layer, head, block))
        slots = plan.lanes.slot_of(seen)
        shape = plan.num_layers, plan.num_kv_heads, len(seen)
        index = plan.page_list.index(np.broadcast_to(slots, shape))[layer, head]
        assert (np.broadcast_to(slots, shape)[layer, head] == seen).all()
        assert not given_back & set(index.tolist())
        assert index.max() < plan.entries(accepted + 1)


@given(plans() | thinned_plans(), accepted_tokens, guesses_of_a_step)
def test_a_step_holds_what_the_plan_says_of_all_its_tokens(
    plan: PagePlan, accepted: int, guesses: int
) -> None:
    plan = guessing(plan, guesses)
    now = accepted + 1 + guesses
    held = plan.entries(now) - len(plan.given_back(0, accepted))
    assert held <= plan.pages(now, in_flight=1 + guesses)
    assert held <= plan.most_pages(now, in_flight=1 + guesses)


@given(plans(), guesses_of_a_step)
def test_nothing_is_written_over_and_nothing_waits_in_scratch(
    plan: PagePlan, guesses: int
) -> None:
    assert plan.recycles
    assert not guessing(plan, guesses).recycles
    assert scratch_pages(guessing(plan, guesses), 512, 8) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_rule_hands_its_lookahead_to_every_plan(shared: bool) -> None:
    steps: dict[str, Any] = {"in_flight": 512, "shared": shared, "lookahead": 5}
    rule = rule_under(SINKS_AND_RECENT, MODEL, 32, 1024, **steps)
    assert isinstance(rule, StreamRule)
    assert rule.plan(1024).lookahead == rule.largest.lookahead == 5
    assert any("more while prompts are read" in line for line in rule.remarks())


@pytest.mark.parametrize("name", ["h2o", "snapkv", "heterogeneous"])
def test_policies_that_evict_by_what_is_read_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^--speculative-config: --policy {name} "):
        rule_under(create_policy(name, {}), MODEL, 32, 1024, lookahead=4)


def test_what_was_not_worked_out_beside_guesses_is_refused() -> None:
    refusals: dict[str, dict[str, Any]] = {
        "--tensor-parallel-size=2": {"ranks": 2},
        "--allow-request-policies": {"mixed": True},
        "--protect": {"protects": True},
        "the range of budgets of --policy sink-recent": {"richer": [SINKS_AND_RECENT]},
    }
    for refused, options in refusals.items():
        with pytest.raises(UserError, match=f"^--speculative-config: {refused} "):
            rule_under(SINKS_AND_RECENT, MODEL, 32, 1024, lookahead=4, **options)


def test_heads_of_unequal_number_are_refused() -> None:
    model = replace(MODEL, layer_heads=((2, 8), (1, 8)))
    with pytest.raises(UserError, match=r"^--speculative-config: layers of tiny "):
        rule_under(SINKS_AND_RECENT, model, 32, 1024, lookahead=4)
