# SPDX-License-Identifier: Apache-2.0
"""The page plan against its own rules, spelled out slowly."""

from __future__ import annotations

import pickle
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan import PagePlan, blocks_of, scratch_pages
from policies.base import FULL, HeadBudget
from tests.reference.visibility import held_positions, visible_positions
from tests.unit.simulator import FULL_LANE, make_plan, plans, seeds

MAX_BLOCKS = 12
ONE_OF_EACH = make_plan(4, [[FULL_LANE, (1, 2)], [(2, 1), (3, 3)]])


def occupied_indices(plan: PagePlan, blocks: int) -> list[int]:
    """List index of every slot that some block of the first ``blocks`` lives in."""
    opened = np.broadcast_to(np.arange(blocks), (*plan.capacity.shape, blocks))
    slots = plan.slot_of(opened)
    index = plan.list_index(slots)
    lanes = np.ndindex(*plan.capacity.shape)
    pairs = {
        (lane, int(slot)): int(i)
        for lane in lanes
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


@given(plans(), st.integers(0, MAX_BLOCKS), st.integers(0, MAX_BLOCKS))
def test_blocks_share_a_slot_only_a_multiple_of_the_window_apart(
    plan: PagePlan, one: int, other: int
) -> None:
    slot, also = (plan.slot_of(np.array([block]))[..., 0] for block in (one, other))
    for lane in np.ndindex(*plan.capacity.shape):
        sinks, window = plan.sink_array[lane], plan.window_array[lane]
        in_ring = bool(window) and min(one, other) >= sinks
        shared = one == other or (in_ring and (one - other) % window == 0)
        assert (slot[lane] == also[lane]) == shared
        assert 0 <= slot[lane] < plan.capacity[lane]


@given(plans(), st.integers(0, MAX_BLOCKS))
def test_visible_blocks_are_those_of_the_rule(plan: PagePlan, block: int) -> None:
    last_query = (block + 1) * plan.page_size - 1
    listed = plan.visible_blocks(np.array([block]))
    assert listed.shape == (*plan.capacity.shape, 1, plan.bounded_width)
    for layer, head in np.ndindex(*plan.capacity.shape):
        if not plan.windows[layer][head]:
            continue
        seen = visible_positions(plan, layer, head, last_query)
        expected = sorted({position // plan.page_size for position in seen})
        padding = [-1] * (plan.bounded_width - len(expected))
        assert listed[layer, head, 0].tolist() == expected + padding


@given(plans(), st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_visible_tokens_are_those_of_the_rule(
    plan: PagePlan, lengths: list[int]
) -> None:
    visible = plan.visible_tokens(np.array(lengths))
    for layer, head in np.ndindex(*plan.capacity.shape):
        expected = [len(visible_positions(plan, layer, head, n - 1)) for n in lengths]
        assert visible[layer, head].tolist() == expected


@given(plans(), st.integers(0, 60))
def test_a_lane_retains_what_no_later_block_overwrote(
    plan: PagePlan, tokens: int
) -> None:
    for layer, head in np.ndindex(*plan.capacity.shape):
        expected = held_positions(plan, layer, head, tokens)
        assert plan.retained(layer, head, tokens) == expected


@given(plans(), st.integers(0, 60))
def test_a_lane_retains_all_that_the_next_query_sees(
    plan: PagePlan, tokens: int
) -> None:
    for layer, head in np.ndindex(*plan.capacity.shape):
        seen = set(visible_positions(plan, layer, head, tokens)) - {tokens}
        assert seen <= set(plan.retained(layer, head, tokens))


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
    assert ONE_OF_EACH.has_bounded_lanes
    assert ONE_OF_EACH.bounded_width == 6


@given(plans())
def test_a_plan_survives_the_trip_to_another_process(plan: PagePlan) -> None:
    plan.pages(40)  # fills caches, which must not travel as identity
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert hash(copy) == hash(plan)
    assert copy.pages(40) == plan.pages(40)


@given(plans(), st.integers(0, 60))
def test_the_full_plan_holds_every_block(plan: PagePlan, tokens: int) -> None:
    lanes = plan.num_layers * plan.num_kv_heads
    full = plan.full
    assert not full.has_bounded_lanes
    assert full.pages(tokens) == blocks_of(tokens, plan.page_size) * lanes
    assert full.pages(tokens) >= plan.pages(tokens)


def test_a_plan_describes_its_lanes_in_tokens() -> None:
    plan = make_plan(32, [[FULL_LANE, (1, 7)], [(1, 7), (2, 6)]])
    assert plan.describe() == (
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
