# SPDX-License-Identifier: Apache-2.0
"""The page lists of thinned lanes, built token by token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan.blocks import blocks_of
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import describe
from policies.base import FULL, HeadBudget
from tests.reference.visibility import (
    groups_in_front,
    kept_of_group,
    visible_blocks,
)
from tests.unit.simulator import thinned_plans

MAX_TOKENS = 60
Entry = tuple[str, int, int, int]
Lane = tuple[int, int]


@dataclass
class PageList:
    """What a page list names, entry by entry, as tokens are computed."""

    plan: PagePlan
    tokens: int = 0
    entries: list[Entry] = field(default_factory=list)

    @property
    def lanes(self) -> list[Lane]:
        return [*np.ndindex(self.plan.num_layers, self.plan.num_kv_heads)]

    def kept(self, lane: Lane, block: int) -> int:
        """Tokens that are left of what a query in ``block`` has left behind."""
        keep = kept_of_group(self.plan, *lane)
        return keep * groups_in_front(self.plan, *lane, block) if keep else 0

    def compute(self, tokens: int) -> PageList:
        """Compute one token after the other."""
        size = self.plan.page_size
        while self.tokens < tokens:
            block = self.tokens // size
            if self.tokens % size == 0:
                self.entries += [("raw", *lane, block) for lane in self.lanes]
            self.tokens += 1
            if self.tokens % size == 0:
                self._leave(block + 1)
        return self

    def _leave(self, block: int) -> None:
        """Pack what leaves in front of ``block``, and what lay in a page half empty."""
        for lane in self.lanes:
            before, now = self.kept(lane, block - 1), self.kept(lane, block)
            if now > before:
                first, size = before // self.plan.page_size, self.plan.page_size
                pages = range(first, blocks_of(now, size))
                self.entries += [("packed", *lane, page) for page in pages]

    def needed(self, block: int) -> set[int]:
        """Entries that queries in ``block`` and behind it see."""
        last = {entry: index for index, entry in enumerate(self.entries)}
        found = set()
        for lane in self.lanes:
            seen = visible_blocks(self.plan, *lane, block)
            later = range(block + 1, MAX_TOKENS)
            found |= {
                last["raw", *lane, b]
                for b in [*seen, *later]
                if ("raw", *lane, b) in last
            }
            found |= {
                index
                for (kind, *of_lane, _), index in last.items()
                if kind == "packed" and tuple(of_lane) == lane
            }
        return found


@given(thinned_plans(), st.integers(1, MAX_TOKENS))
def test_a_list_has_an_entry_for_each_page(plan: PagePlan, tokens: int) -> None:
    assert plan.entries(tokens) == len(PageList(plan).compute(tokens).entries)


@given(thinned_plans(), st.integers(1, MAX_TOKENS))
def test_each_entry_is_where_the_plan_says(plan: PagePlan, tokens: int) -> None:
    listed = PageList(plan).compute(tokens)
    blocks = np.arange(blocks_of(tokens, plan.page_size))
    shape = plan.num_layers, plan.num_kv_heads, len(blocks)
    index = plan.page_list.index(np.broadcast_to(blocks, shape))
    for layer, head, block in np.ndindex(shape):
        entry = listed.entries[index[layer, head, block]]
        assert entry == ("raw", layer, head, block)
    for event in range(1, plan.history.events(tokens // plan.page_size) + 1):
        lanes, pages = plan.history.pages_of(event)
        entries = plan.page_list.packed(event)
        for lane, page, at in zip(lanes, pages, entries, strict=True):
            where = divmod(int(lane), plan.num_kv_heads)
            assert listed.entries[at] == ("packed", *where, page)


@given(thinned_plans(), st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS))
def test_what_no_query_sees_is_given_back(plan: PagePlan, one: int, other: int) -> None:
    before, now = sorted([one, other])
    listed = PageList(plan).compute(before)
    held = listed.needed(before // plan.page_size)
    opened = {*range(len(listed.entries), len(listed.compute(now).entries))}
    given_back = plan.given_back(before, now)
    assert sorted(given_back, reverse=True) == given_back.tolist()
    needed = listed.needed(now // plan.page_size)
    assert set(given_back.tolist()) == (held | opened) - needed


@given(thinned_plans(), st.integers(1, MAX_TOKENS), st.integers(1, 20))
def test_pages_are_those_held_while_the_last_tokens_are_computed(
    plan: PagePlan, tokens: int, in_flight: int
) -> None:
    for end in range(max(1, tokens - 12), tokens + 1):
        # A step holds most that ends here and has begun as early as it may.
        last = blocks_of(end, plan.page_size) - 1
        first = max(0, last * plan.page_size + 1 - in_flight)
        listed = PageList(plan).compute(first)
        held = listed.needed(first // plan.page_size)
        count = len(listed.entries)
        opened = len(listed.compute(end).entries) - count
        assert plan.pages(end, in_flight) == len(held) + opened
    most = plan.most_pages(tokens, in_flight)
    assert most >= max(plan.pages(n, in_flight) for n in range(1, tokens + 1))


@given(thinned_plans(), st.integers(1, MAX_TOKENS))
def test_a_lane_holds_what_its_last_query_sees(plan: PagePlan, tokens: int) -> None:
    held = plan.lane_tokens(tokens)
    listed = PageList(plan)
    last = (tokens - 1) // plan.page_size
    for lane in listed.lanes:
        seen = visible_blocks(plan, *lane, last)
        raw = sum(position // plan.page_size in seen for position in range(tokens))
        assert held[lane] == raw + listed.kept(lane, last)


def test_a_head_that_keeps_all_of_a_group_is_a_full_one() -> None:
    heads = HeadBudget(32, 64, group=64, keep=64), HeadBudget(32, 64, group=64, keep=16)
    plan = PagePlan.from_budgets((heads,), 32)
    assert plan.windows == ((0, 2),)
    assert plan.keep == ((-1, 16),)
    assert PagePlan.from_budgets((heads[:1],), 32).recycles


def test_a_short_request_is_not_thinned() -> None:
    head = HeadBudget(32, 64, group=64, keep=16)
    assert PagePlan.from_budgets(((head,),), 32, 96).group == 0
    assert PagePlan.from_budgets(((head,),), 32, 97).group == 2


def test_what_heads_keep_between_sinks_and_window_is_said() -> None:
    heads = tuple(HeadBudget(32, 64, group=64, keep=keep) for keep in (0, 16))
    said = describe(PagePlan.from_budgets((heads,), 32))
    assert said.startswith("of 2 KV heads 2 keep 32 sinks + 64 recent tokens ")
    assert said.endswith("; of each 64 between, heads keep 0 to 16)")
    full = PagePlan.from_budgets(((FULL,),), 32)
    assert "between" not in describe(full)


def test_groups_have_whole_pages() -> None:
    head = HeadBudget(32, 64, group=40, keep=16)
    with pytest.raises(UserError, match=r"group=40: .* give 64"):
        PagePlan.from_budgets(((head,),), 32)


def test_heads_that_are_thinned_leave_together() -> None:
    one = HeadBudget(32, 64, group=64, keep=16)
    with pytest.raises(UserError, match="of unequal length"):
        PagePlan.from_budgets(((one, replace(one, recent=96), FULL),), 32)
