# SPDX-License-Identifier: Apache-2.0
"""Plans of heads that are dealt to tensor-parallel ranks."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.engine.batch.page_tables import PageTables
from kvserve.plan.blocks import blocks_of
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import scratch_pages
from policies.base import FULL, HeadBudget
from tests.reference.visibility import held_positions, slots, visible_blocks
from tests.unit.simulator import (
    FULL_LANE,
    Scheduler,
    make_plan,
    plans,
    ranked_plans,
    refresh,
    seeds,
)

MAX_BLOCKS = 12
MAX_TOKENS = 40


def heads_of_rank(plan: PagePlan, rank: int) -> range:
    width = plan.num_kv_heads // plan.ranks
    return range(rank * width, (rank + 1) * width)


@given(ranked_plans(), st.integers(0, MAX_BLOCKS - 1))
def test_a_rank_sees_of_its_heads_what_one_rank_would_see(
    plan: PagePlan, block: int
) -> None:
    for rank, own in enumerate(plan.by_rank):
        assert (own.num_layers, own.ranks) == (plan.num_layers, 1)
        heads = heads_of_rank(plan, rank)
        assert own.num_kv_heads == len(heads)
        for layer in range(plan.num_layers):
            for place, head in enumerate(heads):
                found = visible_blocks(own, layer, place, block)
                assert found == visible_blocks(plan, layer, head, block)
                found = slots(own, layer, place, block + 1)
                assert found == slots(plan, layer, head, block + 1)


@given(ranked_plans(), st.integers(0, 60))
def test_a_request_holds_what_the_rank_that_needs_most_holds(
    plan: PagePlan, tokens: int
) -> None:
    held = [0] * plan.ranks
    for rank in range(plan.ranks):
        for layer in range(plan.num_layers):
            for head in heads_of_rank(plan, rank):
                positions = held_positions(plan, layer, head, tokens)
                held[rank] += len({p // plan.page_size for p in positions})
    assert plan.pages(tokens) == max(held)
    if tokens:
        mean = sum(held) / plan.ranks
        assert plan.imbalance(tokens) == pytest.approx(max(held) / mean)


@given(ranked_plans())
def test_pages_of_ranks_never_shrink(plan: PagePlan) -> None:
    held = [plan.pages(tokens) for tokens in range(60)]
    assert held == sorted(held)


@given(ranked_plans())
def test_every_rank_finds_its_pages_in_the_one_list(plan: PagePlan) -> None:
    for blocks in range(1, MAX_BLOCKS + 1):
        length = plan.pages(blocks * plan.page_size)
        for own in plan.by_rank:
            index = {
                slot: own.page_list.index(
                    np.full((own.num_layers, own.num_kv_heads, 1), slot)
                )
                for slot in range(blocks)
            }
            used = [
                int(index[slot][layer, head, 0])
                for layer, head in np.ndindex(own.num_layers, own.num_kv_heads)
                for slot in set(slots(own, layer, head, blocks))
            ]
            assert len(used) == len(set(used))
            assert max(used) < length


@settings(max_examples=40)
@given(ranked_plans(), seeds())
def test_tables_of_a_rank_list_one_page_a_slot_out_of_what_requests_hold(
    plan: PagePlan, rng: Random
) -> None:
    scheduler = Scheduler(plan, rng)
    tables = [
        PageTables(plan, scheduler.max_requests, MAX_TOKENS, scheduler.rule, rank)
        for rank in range(plan.ranks)
    ]
    for _ in range(15):
        batch = scheduler.next_batch()
        for own, table in zip(plan.by_rank, tables, strict=True):
            for request in batch.requests:
                table.expect(request.name, request.prompt, 0)
            table.forget(batch.restarted)
            refresh(table, batch)
            for row, request in enumerate(batch.requests):
                blocks = blocks_of(int(batch.seq_lens[row]), plan.page_size)
                listed = [
                    int(table.by_slot[layer, row, head, slot])
                    for layer, head in np.ndindex(own.num_layers, own.num_kv_heads)
                    for slot in set(slots(own, layer, head, blocks))
                ]
                assert len(listed) == len(set(listed))
                assert set(listed) <= set(request.pages)
        scheduler.finish(batch)


@given(plans())
def test_one_rank_owns_all_heads(plan: PagePlan) -> None:
    assert plan.by_rank == (plan,)
    assert plan.imbalance(20) == 1


def test_uneven_heads_cost_what_the_largest_rank_holds_beyond_its_share() -> None:
    lanes = [[FULL_LANE, FULL_LANE, (1, 1), (1, 1)]]
    whole = make_plan(4, lanes)
    plan = PagePlan(4, whole.sinks, whole.windows, ranks=2)
    assert [own.pages(32) for own in plan.by_rank] == [16, 4]
    assert plan.pages(32) == 16
    assert plan.imbalance(32) == 1.6
    turned = make_plan(4, [lanes[0][::2] + lanes[0][1::2]])
    even = PagePlan(4, turned.sinks, turned.windows, ranks=2)
    assert (even.pages(32), even.imbalance(32)) == (10, 1)


def test_a_head_of_several_ranks_has_a_lane_on_each() -> None:
    budgets = ((FULL, HeadBudget(32, 64)),)
    plan = PagePlan.from_budgets(budgets, 32, ranks=4)
    windows = [own.windows for own in plan.by_rank]
    assert windows == [((0,),), ((0,),), ((2,),), ((2,),)]
    assert plan.pages(320) == 10
    assert plan.full.pages(320) == 10


def test_scratch_of_a_rank_serves_its_own_heads() -> None:
    lanes = [[(1, 2)] * 4]
    one = make_plan(4, lanes)
    two = PagePlan(4, one.sinks, one.windows, ranks=2)
    assert scratch_pages(two, 64, 8) * 2 == scratch_pages(one, 64, 8)
