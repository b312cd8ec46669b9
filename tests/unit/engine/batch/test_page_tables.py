# SPDX-License-Identifier: Apache-2.0
"""Page tables kept up to date step by step, against tables built afresh."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.engine.batch.page_tables import PageTables
from kvserve.plan.blocks import blocks_of
from kvserve.plan.lanes import PageArray
from kvserve.plan.page_plan import PagePlan
from tests.reference.visibility import slots, visible_blocks
from tests.unit.simulator import (
    FULL_LANE,
    UNKNOWN_PAGE,
    Batch,
    DrawnRule,
    Scheduler,
    make_plan,
    plans,
    refresh,
    rules,
    seeds,
)

SIZE = 4
NOTHING = np.zeros(2, dtype=np.int64)
MIXED = make_plan(SIZE, [[FULL_LANE, (1, 2)], [(2, 1), (1, 3)]])
MAX_TOKENS = 40


def page_lists(plan: PagePlan, lengths: list[int], first_page: int = 100) -> PageArray:
    """Give each row a page list of its own, one after the other."""
    lists = np.full((4, plan.pages(MAX_TOKENS)), UNKNOWN_PAGE, dtype=np.int32)
    for row, tokens in enumerate(lengths):
        held = plan.pages(tokens)
        lists[row, :held] = np.arange(first_page, first_page + held)
        first_page += held
    return lists


def filled_tables(plan: PagePlan, names: list[str], lengths: list[int]) -> PageTables:
    tables = PageTables(plan, 4, MAX_TOKENS)
    tables.forget(names)
    tables.refresh(names, page_lists(plan, lengths), np.array(lengths), NOTHING)
    return tables


def contents(tables: PageTables, plan: PagePlan, lengths: list[int]) -> list[object]:
    """List everything that is defined in the tables of the first rows."""
    return contents_of_rows(tables, [plan] * len(lengths), lengths)


def contents_of_rows(
    tables: PageTables, plans: list[PagePlan], lengths: list[int]
) -> list[object]:
    """The same, of rows that have plans of their own."""
    found: list[object] = []
    for row, (plan, tokens) in enumerate(zip(plans, lengths, strict=True)):
        last = (tokens - 1) // plan.page_size
        for layer, head in np.ndindex(plan.num_layers, plan.num_kv_heads):
            used = sorted(set(slots(plan, layer, head, last + 1)))
            seen = len(visible_blocks(plan, layer, head, last))
            lane = (layer, row, head)
            found.append(tables.by_slot[lane][used].tolist())
            found.append(tables.ordered[lane][:seen].tolist())
            found.append(int(tables.open_page[lane]))
    return found


def forbid_writes(tables: PageTables) -> None:
    for table in (tables.by_slot, tables.ordered, tables.open_page):
        table.flags.writeable = False


def assert_lists_one_page_a_slot(tables: PageTables, batch: Batch) -> None:
    """Check that the slots in use are exactly the pages each request holds."""
    for row, request in enumerate(batch.requests):
        plan = request.plan
        blocks = blocks_of(int(batch.seq_lens[row]), plan.page_size)
        listed: list[int] = []
        for layer, head in np.ndindex(plan.num_layers, plan.num_kv_heads):
            used = sorted(set(slots(plan, layer, head, blocks)))
            listed += tables.by_slot[layer, row, head, used].tolist()
        assert sorted(listed) == sorted(request.pages)


def test_engine_tables_import_without_vllm_or_torch() -> None:
    code = (
        "import sys, kvserve.engine.batch.page_tables, kvserve.engine.batch.rows;"
        "sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def check_step_by_step(plan: PagePlan | DrawnRule, rng: Random) -> None:
    scheduler = Scheduler(plan, rng)

    def new_tables() -> PageTables:
        rule = scheduler.rule
        return PageTables(rule.plans[0], scheduler.max_requests, MAX_TOKENS, rule)

    kept = new_tables()
    for _ in range(15):
        batch = scheduler.next_batch()
        fresh = new_tables()
        for request in batch.requests:
            for tables in (kept, fresh):
                tables.expect(request.name, request.prompt, 0)
        kept.forget(batch.restarted)
        refresh(kept, batch)
        refresh(fresh, batch)
        plans, lengths = [r.plan for r in batch.requests], batch.seq_lens.tolist()
        expected = contents_of_rows(fresh, plans, lengths)
        assert contents_of_rows(kept, plans, lengths) == expected
        assert_lists_one_page_a_slot(kept, batch)
        scheduler.finish(batch)


@settings(max_examples=60)
@given(plans(), seeds())
def test_tables_kept_step_by_step_equal_tables_built_afresh(
    plan: PagePlan, rng: Random
) -> None:
    check_step_by_step(plan, rng)


@settings(max_examples=40)
@given(rules(), seeds())
def test_tables_of_requests_with_plans_of_their_own_do_too(
    rule: DrawnRule, rng: Random
) -> None:
    check_step_by_step(rule, rng)


@given(plans(), st.integers(1, MAX_TOKENS))
def test_a_decode_row_lists_what_it_sees_and_the_open_page_last(
    plan: PagePlan, tokens: int
) -> None:
    tables = filled_tables(plan, ["a"], [tokens])
    last = (tokens - 1) // plan.page_size
    for layer, head in np.ndindex(plan.num_layers, plan.num_kv_heads):
        blocks = visible_blocks(plan, layer, head, last)
        slot_of = slots(plan, layer, head, last + 1)
        expected = tables.by_slot[layer, 0, head, [slot_of[b] for b in blocks]]
        assert (tables.ordered[layer, 0, head, : len(blocks)] == expected).all()
        assert tables.open_page[layer, 0, head] == expected[-1]


@given(plans(), st.integers(1, MAX_TOKENS))
def test_each_slot_has_the_page_that_the_plan_names(
    plan: PagePlan, tokens: int
) -> None:
    lists = page_lists(plan, [tokens])
    tables = filled_tables(plan, ["a"], [tokens])
    for block in range(blocks_of(tokens, plan.page_size)):
        shape = plan.num_layers, plan.num_kv_heads, 1
        slot = np.broadcast_to(plan.lanes.slot_of(np.array([block])), shape)
        index = plan.page_list.index(slot)[..., 0]
        found = np.take_along_axis(tables.by_slot[:, 0], slot, 2)[..., 0]
        assert (found == lists[0][index]).all()


def test_without_bounded_lanes_one_table_serves_both_orders() -> None:
    tables = PageTables(make_plan(SIZE, [[FULL_LANE] * 2]), 4, MAX_TOKENS)
    assert tables.ordered is tables.by_slot


def test_a_window_beyond_the_longest_request_is_cut_to_it() -> None:
    plan = make_plan(SIZE, [[(3, 50), FULL_LANE]])
    tables = filled_tables(plan, ["a"], [MAX_TOKENS])
    assert tables.ordered.shape[3] == MAX_TOKENS // SIZE
    assert (tables.ordered[0, 0] == tables.by_slot[0, 0]).all()


def test_a_decode_step_that_opens_no_block_leaves_the_tables_alone() -> None:
    tables = filled_tables(MIXED, ["a", "b"], [14, 21])
    forbid_writes(tables)
    unread = np.full((4, MIXED.pages(MAX_TOKENS)), UNKNOWN_PAGE, dtype=np.int32)
    tables.refresh(["a", "b"], unread, np.array([15, 22]), NOTHING)
    tables.refresh(["a", "b"], unread, np.array([16, 23]), NOTHING)


def test_a_new_block_rewrites_its_own_row_only() -> None:
    lengths = [16, 21]
    tables = filled_tables(MIXED, ["a", "b"], lengths)
    before = contents(tables, MIXED, lengths)
    lists = page_lists(MIXED, [17])
    tables.refresh(["a", "b"], lists, np.array([17, 22]), NOTHING)
    half = len(before) // 2
    after = contents(tables, MIXED, [17, 22])
    assert after[half:] == before[half:]
    assert after[:half] == contents(filled_tables(MIXED, ["a"], [17]), MIXED, [17])


def test_rows_that_swap_requests_swap_pages() -> None:
    tables = filled_tables(MIXED, ["a", "b"], [14, 15])
    lists = page_lists(MIXED, [14, 15])[[1, 0, 2, 3]]
    tables.refresh(["b", "a"], lists, np.array([15, 14]), NOTHING)
    before = contents(filled_tables(MIXED, ["a", "b"], [14, 15]), MIXED, [14, 15])
    half = len(before) // 2
    assert contents(tables, MIXED, [15, 14]) == before[half:] + before[:half]


def test_a_request_that_sat_out_some_steps_finds_its_pages_again() -> None:
    tables = filled_tables(MIXED, ["a", "b"], [14, 15])
    expected = contents(tables, MIXED, [14, 15])
    tables.refresh(["a"], page_lists(MIXED, [14]), np.array([14]), NOTHING)
    tables.refresh(["c"], page_lists(MIXED, [30], 500), np.array([30]), NOTHING)
    tables.refresh(["a", "b"], page_lists(MIXED, [14, 15]), np.array([14, 15]), NOTHING)
    assert contents(tables, MIXED, [14, 15]) == expected


def test_a_resumed_request_of_equal_length_reads_its_new_pages() -> None:
    tables = filled_tables(MIXED, ["a"], [14])
    lists = page_lists(MIXED, [14], first_page=500)
    tables.forget(["a"])
    tables.refresh(["a"], lists, np.array([14]), NOTHING)
    assert min(tables.by_slot[0, 0, 0, :4]) >= 500
    fresh = PageTables(MIXED, 4, MAX_TOKENS)
    fresh.refresh(["a"], lists, np.array([14]), NOTHING)
    assert contents(tables, MIXED, [14]) == contents(fresh, MIXED, [14])


def test_forgetting_lasts_until_the_next_refresh_and_no_longer() -> None:
    tables = filled_tables(MIXED, ["a"], [14])
    tables.forget(["a", "not here"])
    tables.refresh(["a"], page_lists(MIXED, [14], 500), np.array([14]), NOTHING)
    forbid_writes(tables)
    tables.refresh(["a"], page_lists(MIXED, [14], 900), np.array([15]), NOTHING)
