# SPDX-License-Identifier: Apache-2.0
"""Pages of requests that select after a dense prefill, against lanes filled by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.plan.blocks import blocks_of
from kvserve.plan.dense import DensePlan, DenseRule
from policies.base import Lane, ModelShape
from policies.snapkv import SnapKV

MAX_TOKENS = 40


@st.composite
def dense_plans(draw: st.DrawFn) -> DensePlan:
    page_size, prompt = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    heads = draw(st.integers(1, 3))

    def lane() -> Lane:
        keep = draw(st.integers(1, prompt))
        tail = draw(st.sampled_from(["append", "ring", "heavy"]))
        if tail == "append":
            return Lane(keep)
        recent = draw(st.integers(1, keep))
        limit = draw(st.integers(keep, keep + 10))
        if tail == "ring":
            return Lane(keep, "ring", recent, draw(st.sampled_from([0, limit])))
        return Lane(keep, "heavy", recent, limit)

    layers = draw(st.integers(1, 3))
    lanes = tuple(tuple(lane() for _ in range(heads)) for _ in range(layers))
    return DensePlan(rule(layers, heads, page_size), prompt, lanes)


def rule(layers: int, heads: int, page_size: int, window: int = 1) -> DenseRule:
    """A rule whose lanes the tests draw themselves."""
    model = ModelShape("drawn", layers, heads, heads, 8)
    return DenseRule(SnapKV(window=window), model, page_size, MAX_TOKENS)


def lane_tokens(lane: Lane, generated: int) -> int:
    grown = lane.keep + generated
    if lane.tail == "ring":
        return min(grown, max(lane.keep, lane.limit))
    return grown if lane.tail == "append" else min(grown, lane.limit + 1)


@settings(deadline=None)
@given(dense_plans())
def test_pages_are_those_of_the_lanes(plan: DensePlan) -> None:
    lanes = [lane for layer in plan.lanes for lane in layer]
    for generated in range(MAX_TOKENS - plan.prompt_tokens):
        tokens = plan.prompt_tokens + generated
        held = sum(
            blocks_of(lane_tokens(lane, generated), plan.page_size) for lane in lanes
        )
        if plan.is_whole:
            held = len(lanes) * blocks_of(tokens, plan.page_size)
        assert plan.pages(tokens) == held
        assert plan.most_pages(tokens) >= max(held, plan.prompt_entries)


@settings(deadline=None)
@given(dense_plans())
def test_every_page_that_a_lane_needs_has_one_entry_in_time(plan: DensePlan) -> None:
    if plan.is_whole:
        return
    lanes = [lane for layer in plan.lanes for lane in layer]
    place: dict[tuple[int, int], int] = {}
    kept_lane, kept_slot = plan.kept_slots
    assert len(kept_lane) == plan.kept_entries <= plan.prompt_entries
    kept = zip(kept_lane, kept_slot, strict=True)
    place.update({key: index for index, key in enumerate(kept)})
    for index, key in enumerate(zip(*plan.opened_slots, strict=True)):
        assert key not in place
        place[key] = plan.prompt_entries + index
    for generated in range(MAX_TOKENS - plan.prompt_tokens + 1):
        listed = plan.entries(plan.prompt_tokens + generated)
        for number, lane in enumerate(lanes):
            blocks = blocks_of(lane_tokens(lane, generated), plan.page_size)
            assert all(place[number, slot] < listed for slot in range(blocks))


@settings(deadline=None)
@given(dense_plans())
def test_the_page_list_never_shrinks(plan: DensePlan) -> None:
    lengths = [plan.entries(tokens) for tokens in range(MAX_TOKENS + 1)]
    assert lengths == sorted(lengths)


@given(st.integers(1, 500), st.integers(1, 40), st.data())
def test_chunks_end_with_the_prompt_and_the_last_is_long_enough(
    prompt: int, window: int, data: st.DataObject
) -> None:
    lanes = ((Lane(prompt),),)
    plan = DensePlan(rule(1, 1, 32, window), prompt, lanes)
    start, waits = 0, 0
    while start < prompt:
        budget = data.draw(st.integers(1, 80)) if waits < 5 else max(window, 1)
        length = plan.chunk(start, min(budget, prompt + 3 - start))
        assert 0 <= length <= budget
        waits = waits + 1 if length == 0 else 0
        if length == 0:
            # It waits at the window alone, for a step that holds all of it.
            assert start == max(prompt - window, 0)
            continue
        start += length
        assert start <= prompt
        if start == prompt:
            assert length >= min(window, prompt)
    assert plan.chunk(prompt, 10) == 1
