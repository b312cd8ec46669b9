# SPDX-License-Identifier: Apache-2.0
"""What requests with shared pages hold, need and give back, spelled out slowly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.plan.blocks import blocks_of
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.prefix import PrefixPages
from kvserve.plan.streaming import scratch_pages
from tests.reference.visibility import stays, visible_blocks
from tests.unit.simulator import plans, ranked_plans

MAX_BLOCKS = 12
blocks = st.integers(0, MAX_BLOCKS)


def shared(plan: PagePlan) -> PagePlan:
    return replace(plan, is_shared=True)


def shared_plans() -> st.SearchStrategy[PagePlan]:
    """Draw plans of shared pages, of one rank or of several."""
    return (plans() | ranked_plans()).map(shared)


def width_of(plan: PagePlan) -> int:
    return plan.num_layers * plan.heads_per_rank


def seen_entries(plan: PagePlan, query: int) -> set[int]:
    """Entries of the page list that a query in block ``query`` sees, on any rank."""
    found = set()
    for rank in plan.by_rank:
        for place, lane in enumerate(np.ndindex(rank.num_layers, rank.num_kv_heads)):
            for block in visible_blocks(rank, *lane, query):
                found.add(block * width_of(plan) + place)
    return found


def held_entries(plan: PagePlan, computed: int, tokens: int) -> set[int]:
    """Entries that a step holds which takes a request from one length to another."""
    first, last = computed // plan.page_size, blocks_of(tokens, plan.page_size)
    opened = range(first * width_of(plan), last * width_of(plan))
    return seen_entries(plan, first) | set(opened)


@given(shared_plans(), st.integers(1, 40))
def test_every_block_opens_a_page_in_every_lane(plan: PagePlan, tokens: int) -> None:
    assert plan.entries(tokens) == blocks_of(tokens, plan.page_size) * width_of(plan)
    for rank in plan.by_rank:
        shape = rank.num_layers, rank.num_kv_heads, MAX_BLOCKS
        block = np.broadcast_to(np.arange(MAX_BLOCKS), shape)
        assert rank.lanes.opens(block).all()
        assert (rank.lanes.slot_of(block) == block).all()
        places = np.arange(rank.num_lanes).reshape(*shape[:2], 1)
        expected = block * rank.num_lanes + places
        assert (rank.page_list.index(block) == expected).all()


@given(shared_plans())
def test_nothing_waits_in_scratch(plan: PagePlan) -> None:
    assert scratch_pages(plan, 100, 10) == 0


@given(shared_plans(), st.integers(1, 40))
def test_pages_are_those_that_the_last_token_sees(plan: PagePlan, tokens: int) -> None:
    last = blocks_of(tokens, plan.page_size) - 1
    assert plan.pages(tokens) == len(seen_entries(plan, last))


@settings(max_examples=40)
@given(shared_plans(), st.integers(1, 24), st.integers(1, 16))
def test_steps_under_way_hold_at_most_what_the_plan_says(
    plan: PagePlan, tokens: int, in_flight: int
) -> None:
    most = max(
        len(held_entries(plan, computed, min(computed + in_flight, tokens)))
        for computed in range(tokens)
    )
    assert plan.most_pages(tokens, in_flight) == most
    if not any(local and local.is_chunk for local in plan.local):
        assert plan.pages(tokens, in_flight) == most


@given(shared_plans(), blocks)
def test_a_boundary_needs_what_its_next_query_sees(
    plan: PagePlan, boundary: int
) -> None:
    needs, width = PrefixPages(plan), width_of(plan)
    assert [needs.width(block) for block in range(4)] == [width] * 4
    found = {
        block * width + place
        for block in range(boundary)
        for place in [*needs.staying(block), *needs.reaching(block, boundary)]
    }
    assert found == {e for e in seen_entries(plan, boundary) if e < boundary * width}


@given(shared_plans(), st.integers(0, 3 * MAX_BLOCKS))
def test_what_stays_is_seen_forever(plan: PagePlan, block: int) -> None:
    expected = {
        place
        for rank in plan.by_rank
        for place, lane in enumerate(np.ndindex(rank.num_layers, rank.num_kv_heads))
        if stays(rank, *lane, block)
    }
    assert set(PrefixPages(plan).staying(block)) == expected


@given(shared_plans(), st.lists(blocks, min_size=1))
def test_pages_are_given_back_once_and_when_nobody_sees_them(
    plan: PagePlan, stops: list[int]
) -> None:
    needs, before, gone = PrefixPages(plan), 0, set[int]()
    for now in sorted(set(stops)):
        size = plan.page_size
        left = plan.given_back(before * size, now * size + size - 1).tolist()
        assert left == sorted(left, reverse=True)
        assert not gone & set(left)
        gone |= set(left)
        assert not len(plan.given_back(now * size, now * size + size - 1))
        listed = set(range(needs.first_entry(now)))
        assert listed - gone == listed & seen_entries(plan, now)
        before = now


@given(plans(), plans())
def test_a_digest_names_a_plan(one: PagePlan, other: PagePlan) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert one.digest != shared(one).digest
