# SPDX-License-Identifier: Apache-2.0
"""The page plan against its own rules, spelled out slowly."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan.blocks import blocks_of
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import StreamRule, describe, scratch_pages
from policies.base import (
    FULL,
    Capabilities,
    HeadBudget,
    Local,
    ModelShape,
    StreamingPolicy,
)
from tests.reference.visibility import (
    held_positions,
    seen_by_model,
    slots,
    visible_blocks,
    visible_positions,
)
from tests.unit.simulator import FULL_LANE, make_plan, plans, seeds

MAX_BLOCKS = 12
ONE_OF_EACH = make_plan(4, [[FULL_LANE, (1, 2)], [(2, 1), (3, 3)]])


def lanes_of(plan: PagePlan) -> Iterator[tuple[int, int]]:
    return np.ndindex(plan.num_layers, plan.num_kv_heads)


def by_lane(plan: PagePlan, values: np.ndarray) -> np.ndarray:
    """Spell out what is the same for all lanes."""
    shape = plan.num_layers, plan.num_kv_heads
    return np.broadcast_to(values, (*shape, *values.shape[-1:]))


def occupied_indices(plan: PagePlan, blocks: int) -> list[int]:
    """List index of every slot that some block of the first ``blocks`` lives in."""
    shape = plan.num_layers, plan.num_kv_heads, blocks
    slots = np.broadcast_to(plan.lanes.slot_of(np.arange(blocks)), shape)
    index = plan.page_list.index(slots)
    pairs = {
        (lane, int(slot)): int(i)
        for lane in lanes_of(plan)
        for slot, i in zip(slots[lane], index[lane], strict=True)
    }
    return list(pairs.values())


@given(plans(), st.integers(0, 60))
def test_a_request_holds_one_page_for_every_slot_in_use(
    plan: PagePlan, tokens: int
) -> None:
    indices = occupied_indices(plan, blocks_of(tokens, plan.page_size))
    assert plan.pages(tokens) == len(set(indices)) == len(indices)


@given(plans())
def test_pages_never_shrink(plan: PagePlan) -> None:
    held = [plan.pages(tokens) for tokens in range(60)]
    assert held == sorted(held)
    assert held[0] == 0


@given(plans())
def test_a_new_block_appends_to_the_page_list_and_moves_nothing(
    plan: PagePlan,
) -> None:
    before: set[int] = set()
    for blocks in range(1, MAX_BLOCKS + 1):
        after = set(occupied_indices(plan, blocks))
        first, last = len(before), plan.pages(blocks * plan.page_size)
        assert after - before == set(range(first, last))
        before = after


@given(plans())
def test_every_token_of_a_block_costs_the_same_pages(plan: PagePlan) -> None:
    size = plan.page_size
    for block in range(MAX_BLOCKS):
        held = {plan.pages(block * size + n) for n in range(1, size + 1)}
        assert len(held) == 1


@given(plans())
def test_a_block_that_leaves_gives_its_slot_to_one_that_will_leave(
    plan: PagePlan,
) -> None:
    blocks = np.arange(MAX_BLOCKS)
    found = by_lane(plan, plan.lanes.slot_of(blocks))
    opens = by_lane(plan, plan.lanes.opens(blocks))
    for lane in lanes_of(plan):
        expected = slots(plan, *lane, MAX_BLOCKS)
        assert found[lane].tolist() == expected
        assert opens[lane].tolist() == [slot == b for b, slot in enumerate(expected)]


@given(plans(), st.integers(0, MAX_BLOCKS))
def test_visible_blocks_are_those_of_the_rule(plan: PagePlan, block: int) -> None:
    width = MAX_BLOCKS + 1
    listed = plan.lanes.visible(np.array([block]), width)
    assert listed.shape == (plan.num_layers, plan.num_kv_heads, 1, width)
    for layer, head in lanes_of(plan):
        expected = visible_blocks(plan, layer, head, block)
        padding = [-1] * (width - len(expected))
        assert listed[layer, head, 0].tolist() == expected + padding


@given(plans(), st.lists(st.integers(0, MAX_BLOCKS), min_size=1, max_size=5))
def test_hidden_blocks_are_those_that_the_rule_does_not_show(
    plan: PagePlan, blocks: list[int]
) -> None:
    hidden = by_lane(plan, plan.lanes.hidden(np.array(blocks)))
    for lane in lanes_of(plan):
        expected = [b + 1 - len(visible_blocks(plan, *lane, b)) for b in blocks]
        assert hidden[lane].tolist() == expected


@given(plans(), st.integers(0, 60))
def test_a_lane_holds_all_that_the_next_query_sees(plan: PagePlan, tokens: int) -> None:
    for lane in lanes_of(plan):
        seen = set(visible_positions(plan, *lane, tokens)) - {tokens}
        assert seen <= set(held_positions(plan, *lane, tokens))


@given(plans(), st.integers(1, 60))
def test_lane_tokens_are_what_the_last_token_sees(plan: PagePlan, tokens: int) -> None:
    found = plan.lane_tokens(tokens)
    assert found.shape == (plan.num_layers, plan.num_kv_heads)
    for lane in lanes_of(plan):
        assert found[lane] == len(visible_positions(plan, *lane, tokens - 1))


@given(plans(), st.integers(0, 60))
def test_a_request_holds_the_pages_of_what_its_lanes_hold(
    plan: PagePlan, tokens: int
) -> None:
    held = sum(
        len({p // plan.page_size for p in held_positions(plan, *lane, tokens)})
        for lane in lanes_of(plan)
    )
    assert plan.pages(tokens) == held


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1),
    st.integers(1, 32),
)
def test_budgets_are_rounded_up_to_whole_pages(
    sizes: list[tuple[int, int]], page_size: int
) -> None:
    budgets = tuple((HeadBudget(*size), FULL) for size in sizes)
    plan = PagePlan.from_budgets(budgets, page_size)
    for (sinks, recent), layer in zip(
        sizes, zip(plan.sinks, plan.windows, strict=True), strict=True
    ):
        (sink_blocks, none), (window, full) = layer
        assert (none, full) == FULL_LANE
        assert sinks <= sink_blocks * page_size < sinks + page_size
        assert recent <= window * page_size < recent + page_size


@pytest.mark.parametrize("budget", [(0, 64), (32, 0), (0, 0), (-1, 64), (32, -5)])
def test_a_bounded_head_without_sinks_or_window_is_refused(
    budget: tuple[int, int],
) -> None:
    head = HeadBudget(*budget)
    with pytest.raises(UserError, match=r"^--policy: .*at least one sink") as caught:
        PagePlan.from_budgets(((FULL, head),), 32)
    assert "\n" not in str(caught.value)
    assert f"{budget[0]} + {budget[1]} tokens" in str(caught.value)


def test_sinks_of_a_full_head_mean_nothing() -> None:
    plan = PagePlan.from_budgets(((HeadBudget(sinks=64),),), 32)
    assert plan == make_plan(32, [[FULL_LANE]])
    assert not plan.has_bounded_lanes


def test_shape_of_a_plan_is_that_of_its_budgets() -> None:
    assert (ONE_OF_EACH.num_layers, ONE_OF_EACH.num_kv_heads) == (2, 2)
    assert ONE_OF_EACH.num_lanes == 4
    assert ONE_OF_EACH.has_bounded_lanes


@given(plans())
def test_a_plan_survives_the_trip_to_another_process(plan: PagePlan) -> None:
    plan.pages(40)  # fills caches, which must not travel as identity
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert hash(copy) == hash(plan)
    assert copy.pages(40) == plan.pages(40)


@given(plans(), st.integers(0, 60))
def test_the_full_plan_holds_every_block_that_the_model_shows(
    plan: PagePlan, tokens: int
) -> None:
    full, blocks = plan.full, blocks_of(tokens, plan.page_size)
    assert not full.has_bounded_lanes or any(plan.local)
    most = [blocks] * plan.num_layers
    for layer, local in enumerate(plan.local):
        if local:
            most[layer] = min(blocks, max(plan.windows[layer]) or blocks)
    assert full.pages(tokens) == sum(most) * plan.num_kv_heads
    assert full.pages(tokens) >= plan.pages(tokens)
    assert full.full == full


@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 70), st.booleans())
def test_a_local_lane_holds_what_its_layer_sees_and_no_block_more(
    tokens: int, page_size: int, query: int, is_chunk: bool
) -> None:
    seen = Local(tokens * page_size if is_chunk else tokens, is_chunk)
    plan = PagePlan.from_budgets((), page_size, local=(seen,), num_kv_heads=1)
    needed = {p // page_size for p in seen_by_model(seen, query)}
    listed = visible_blocks(plan, 0, 0, query // page_size)
    assert needed <= set(listed)
    assert len(listed) <= max(len(needed) + 1, 1)
    # The last query of a block, and the first, together see all that it lists.
    ends = (listed[-1] * page_size, (listed[-1] + 1) * page_size - 1)
    assert {p // page_size for end in ends for p in seen_by_model(seen, end)} == set(
        listed
    )


def test_a_plan_describes_its_lanes_in_tokens() -> None:
    plan = make_plan(32, [[FULL_LANE, (1, 7)], [(1, 7), (2, 6)]])
    assert describe(plan) == (
        "of 4 KV heads 1 keep everything; 2 keep 32 sinks + 224 recent tokens; "
        "1 keep 64 sinks + 192 recent tokens (pages of 32 tokens)"
    )


@cache
def most_new_blocks(page_size: int, tokens: int, requests: int) -> int:
    """Blocks that chunks open after their first one, in the worst schedule of all."""
    if not tokens or not requests:
        return 0
    return max(
        (offset + length - 1) // page_size
        + most_new_blocks(page_size, tokens - length, requests - 1)
        for offset in range(page_size)
        for length in range(1, tokens + 1)
    )


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("requests", [1, 2, 3, 8])
def test_scratch_covers_the_worst_of_all_schedules(
    page_size: int, requests: int
) -> None:
    plan = make_plan(page_size, [[FULL_LANE, (1, 2)]])
    for tokens in range(1, 14):
        worst = most_new_blocks(page_size, tokens, requests)
        assert scratch_pages(plan, tokens, requests) >= worst * plan.num_kv_heads


@given(plans(), st.integers(1, 99), st.integers(1, 16), seeds())
def test_scratch_covers_the_new_blocks_of_random_steps(
    plan: PagePlan, max_tokens: int, max_requests: int, rng: Random
) -> None:
    size, needed, budget = plan.page_size, 0, max_tokens
    for _ in range(max_requests):
        length = min(budget, rng.choice([1, 2, size + 2, rng.randint(1, 99)]))
        # The worst place to start at is the last token of a page.
        first = rng.choice([size - 1, rng.randrange(40)])
        needed += max(0, (first + length - 1) // size - first // size)
        budget -= length
    scratch = scratch_pages(plan, max_tokens, max_requests)
    assert scratch >= needed * plan.num_kv_heads * plan.has_bounded_lanes


def test_without_bounded_lanes_no_scratch_is_taken() -> None:
    assert scratch_pages(make_plan(4, [[FULL_LANE] * 3]), 1024, 16) == 0


def test_scratch_serves_one_layer_at_a_time() -> None:
    lanes = [[FULL_LANE, (1, 2), (1, 2)]]
    one, many = (make_plan(4, lanes * layers) for layers in (1, 30))
    assert scratch_pages(one, 64, 8) == scratch_pages(many, 64, 8)


def test_a_head_whose_budget_holds_the_longest_request_is_a_full_lane() -> None:
    budgets = ((HeadBudget(32, 10**30), HeadBudget(32, 64), HeadBudget(32, 65)),)
    plan = PagePlan.from_budgets(budgets, 32, max_tokens=128)
    assert plan.windows == ((0, 2, 0),)
    assert plan.pages(128) == 4 + 3 + 4


def test_a_sharded_head_keeps_its_places_of_every_turn() -> None:
    head = HeadBudget(0, 64, stride=4, shards=frozenset({1, 3}))
    plan = PagePlan.from_budgets(((head, FULL),), 32)
    assert (plan.stride, plan.shards) == (4, ((0b1010, 0),))
    # Blocks 1, 3, 5, 7 stay; of two blocks in a row one leaves.
    assert [plan.pages(32 * blocks) for blocks in range(9)] == [
        blocks + held for blocks, held in enumerate([0, 1, 2, 2, 3, 3, 4, 4, 5])
    ]
    assert describe(plan) == (
        "of 2 KV heads 1 keep everything; 1 keep 64 recent tokens + 2 of 4 pages "
        "(pages of 32 tokens)"
    )


def test_heads_of_different_strides_are_refused() -> None:
    heads = tuple(HeadBudget(0, 64, stride, shards=frozenset({0})) for stride in (2, 3))
    with pytest.raises(UserError, match="different strides"):
        PagePlan.from_budgets((heads,), 32)


@dataclass(frozen=True)
class Half(StreamingPolicy):
    """Keeps half of what a request may reach."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "none"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming", position_only=True, elastic=True
    )

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        return ((HeadBudget(32, tokens // 2),),)


def test_under_an_elastic_policy_a_request_has_a_plan_of_its_own_length() -> None:
    rule = StreamRule(Half(), ModelShape("toy", 1, 1, 1, 8), 32, max_tokens=1024)
    assert rule.of_request(100, 156).windows == ((4,),)
    assert rule.of_request(100, 412).windows == ((8,),)
    assert rule.of_request(1000, 1000) == rule.longest
    assert rule.pages(1024) == 1 + 16
    assert rule.has_bounded_lanes
