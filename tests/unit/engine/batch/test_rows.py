# SPDX-License-Identifier: Apache-2.0
"""Rows of whole schedules: every query reads the keys of the rule and no others."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.batch.rows import RowBuilder, StepRows
from kvserve.plan.page_plan import PagePlan
from tests.unit.pool_model import PoolModel
from tests.unit.simulator import (
    FULL_LANE,
    Batch,
    DrawnRule,
    Request,
    Scheduler,
    make_plan,
    page_lists_of,
    plans,
    refresh,
    reread_plans,
    rules,
    scratch_of,
    seeds,
    thinned_plans,
    unequal_plans,
)

MAX_REQUESTS, MAX_TOKENS = 4, 40
MIXED = make_plan(4, [[FULL_LANE, (1, 2)], [(1, 1), FULL_LANE]])


class Engine:
    """The worker's half of a step, every read and write of it checked."""

    def __init__(
        self,
        plan: PagePlan | DrawnRule,
        max_requests: int = MAX_REQUESTS,
        token_budget: int = 64,
    ) -> None:
        rule = DrawnRule([plan]) if isinstance(plan, PagePlan) else plan
        self.plan, self.max_requests = rule.plans[0], max_requests
        self.tables = PageTables(self.plan, max_requests, MAX_TOKENS, rule)
        self.builder = RowBuilder(self.plan, self.tables)
        num_scratch = scratch_of(rule, token_budget, max_requests)
        self.pool = PoolModel(self.plan, num_scratch)

    def step(self, batch: Batch) -> StepRows:
        for request in batch.requests:
            self.tables.expect(request.name, request.prompt, 0)
        self.tables.forget(batch.restarted)
        refresh(self.tables, batch)
        step = self.builder.build(batch.query_start, batch.seq_lens)
        self.pool.run(batch, step, self.tables.leaving)
        return step

    def feed(self, *chunks: tuple[Request, int]) -> StepRows:
        """Run one step of the given requests, in row order, with ``n`` tokens each."""
        requests = [request for request, _ in chunks]
        lengths = [length for _, length in chunks]
        for request, length in chunks:
            first = 1000 * (1 + int(request.name))
            held = request.plan.entries(request.computed + length)
            request.pages = list(range(first, first + held))
        lists = page_lists_of(requests, self.max_requests, MAX_TOKENS)
        restarted = [request.name for request in requests if not request.computed]
        step = self.step(Batch(requests, lengths, restarted, lists))
        for request, length in chunks:
            request.computed += length
        return step


def request(name: int, plan: PagePlan = MIXED) -> Request:
    return Request(str(name), plan, MAX_TOKENS, known=MAX_TOKENS, final=MAX_TOKENS)


def check_schedule(plan: PagePlan | DrawnRule, rng: Random) -> None:
    scheduler = Scheduler(plan, rng, MAX_REQUESTS, MAX_TOKENS, token_budget=24)
    engine = Engine(plan, MAX_REQUESTS, token_budget=24)
    for _ in range(12):
        batch = scheduler.next_batch()
        engine.step(batch)
        scheduler.finish(batch)


@settings(max_examples=70)
@given(plans(), seeds())
def test_every_query_of_any_schedule_reads_what_the_rule_says(
    plan: PagePlan, rng: Random
) -> None:
    check_schedule(plan, rng)


@settings(max_examples=100)
@given(thinned_plans(), seeds())
def test_what_is_left_of_a_group_is_read_packed(plan: PagePlan, rng: Random) -> None:
    check_schedule(plan, rng)


@settings(max_examples=100)
@given(plans() | thinned_plans(), st.integers(1, 9), st.booleans(), seeds())
def test_a_refused_token_is_never_read_and_has_taken_nothing(
    plan: PagePlan, lookahead: int, is_shared: bool, rng: Random
) -> None:
    """Not by a later query either, of which some see it packed."""
    check_schedule(replace(plan, lookahead=lookahead, is_shared=is_shared), rng)


@settings(max_examples=50)
@given(unequal_plans(), seeds())
def test_layers_may_have_heads_of_unequal_number_and_size(
    plan: PagePlan, rng: Random
) -> None:
    check_schedule(plan, rng)


@settings(max_examples=50)
@given(reread_plans(), seeds())
def test_later_layers_may_read_what_a_layer_has_cached(
    plan: PagePlan, rng: Random
) -> None:
    check_schedule(plan, rng)


@settings(max_examples=50)
@given(rules(), seeds())
def test_requests_with_plans_of_their_own_share_a_batch(
    rule: DrawnRule, rng: Random
) -> None:
    check_schedule(rule, rng)


@settings(max_examples=50)
@given(plans(max_layers=1), st.integers(1, 8), st.integers(1, 40), seeds())
def test_scratch_suffices_for_any_token_budget_and_batch_size(
    plan: PagePlan, max_requests: int, token_budget: int, rng: Random
) -> None:
    scheduler = Scheduler(plan, rng, max_requests, MAX_TOKENS, token_budget)
    engine = Engine(plan, max_requests, token_budget)
    for _ in range(8):
        batch = scheduler.next_batch()
        engine.step(batch)
        scheduler.finish(batch)


@pytest.mark.parametrize(
    "cuts",
    [[40], [1] * 40, [3, 37], [39, 1], [4] * 10, [5] * 8, [7, 1, 9, 2, 12, 1, 8]],
    ids=str,
)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_prompt_reads_and_keeps_the_same_however_it_is_cut(
    cuts: list[int], window: int
) -> None:
    plan = make_plan(4, [[FULL_LANE, (1, window), (2, 1), (0, window, 0b10)]], 3)
    engine, prompt = Engine(plan), request(0, plan)
    for length in cuts:
        engine.feed((prompt, length))


def mixed_step(engine: Engine) -> StepRows:
    """Two requests decode while a third one reads positions 3 to 12."""
    first, second, third = (request(name, engine.plan) for name in range(3))
    engine.feed((first, 13), (second, 5), (third, 3))
    return engine.feed((first, 1), (second, 1), (third, 10))


def test_decode_rows_are_token_major_and_prefill_rows_head_major() -> None:
    engine = Engine(MIXED)
    step = mixed_step(engine)
    assert step.num_decode_tokens == 2
    chunk, blocks = [10], [1, 4, 4, 1]
    lengths = [
        np.diff(step.shapes[shape].query_start).tolist()
        for shape in step.shape_of_layer
    ]
    assert lengths == [[1] * 4 + chunk + blocks, [1] * 4 + blocks + chunk]


def test_a_row_is_as_long_as_what_its_last_query_sees() -> None:
    engine = Engine(MIXED)
    step = mixed_step(engine)
    seq_lens = [step.shapes[shape].seq_lens.tolist() for shape in step.shape_of_layer]
    assert seq_lens == [
        [14, 10, 6, 6, 13, 4, 8, 12, 9],
        [6, 14, 6, 6, 4, 8, 8, 5, 13],
    ]


def test_layers_of_equal_budgets_share_their_shapes() -> None:
    lanes = [[FULL_LANE, (1, 2)], [(1, 2), FULL_LANE], [FULL_LANE, (1, 2)]]
    engine = Engine(make_plan(4, lanes))
    step = mixed_step(engine)
    first, second, third = step.shape_of_layer
    assert first == third != second
    assert len(step.shapes) == 2


def test_layers_share_their_shapes_until_the_smaller_budget_is_full() -> None:
    engine = Engine(make_plan(4, [[FULL_LANE, (1, 2)], [(1, 2), FULL_LANE]]))
    alike, unlike = request(0, engine.plan), request(1, engine.plan)
    engine.feed((alike, 8), (unlike, 16))
    step = engine.feed((alike, 1), (unlike, 1))
    assert len(step.shapes) == 2
    engine, alike = Engine(engine.plan), request(2, engine.plan)
    engine.feed((alike, 8))
    step = engine.feed((alike, 1))
    assert step.shape_of_layer == [0, 0]


def test_a_decode_step_hands_out_the_tables_without_a_copy() -> None:
    engine = Engine(MIXED)
    first, second = request(0), request(1)
    engine.feed((first, 13), (second, 5))
    step = engine.feed((first, 1), (second, 1))
    assert isinstance(step.page_tables, np.ndarray)
    assert np.shares_memory(step.page_tables, engine.tables.ordered)
    assert step.copies == []


def test_a_one_token_prompt_behind_a_chunk_is_prefill() -> None:
    engine = Engine(MIXED)
    step = engine.feed((request(0), 6), (request(1), 1))
    assert step.num_decode_tokens == 0


def test_a_one_token_prompt_before_a_chunk_is_decode() -> None:
    engine = Engine(MIXED)
    step = engine.feed((request(0), 1), (request(1), 6))
    assert step.num_decode_tokens == 1


@pytest.mark.parametrize(("length", "moved"), [(12, 0), (13, 1), (16, 1), (40, 2)])
def test_blocks_that_survive_a_chunk_move_from_scratch_to_the_ring(
    length: int, moved: int
) -> None:
    engine = Engine(make_plan(4, [[FULL_LANE, (1, 2)]]))
    step = engine.feed((request(0, engine.plan), length))
    ((source, target),) = step.copies
    assert len(source) == len(target) == moved
