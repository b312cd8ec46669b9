# SPDX-License-Identifier: Apache-2.0
"""The books of the scheduler process: receipts, peaks and evictions."""

from __future__ import annotations

from kvserve.plan.ledger import Ended, Ledger
from policies.sink_recent import SinkRecent
from tests.unit.simulator import FULL_LANE, make_plan

PLAN = make_plan(4, [[FULL_LANE, (1, 2)], [(1, 2), (1, 2)]])
LANES = 4


def run(ledger: Ledger, name: str, tokens: int) -> None:
    """Let a request grow to ``tokens`` tokens, one at a time."""
    for now in range(1, tokens + 1):
        ledger.tokens[name] = now
        ledger.grown(name, PLAN.pages(now))


def test_a_receipt_counts_what_was_seen_kept_and_evicted() -> None:
    ledger = Ledger(PLAN.full)
    run(ledger, "a", 22)
    ledger.close("a", PLAN, PLAN.pages(22))
    (receipt,) = ledger.receipts(())
    # Bounded lanes see the sink block, block 4, and 2 tokens of block 5.
    assert receipt.entries_retained == 22 + 3 * (4 + 4 + 2)
    assert receipt.tokens_seen == 22
    assert receipt.entries_seen == 22 * LANES
    assert receipt.entries_evicted == 88 - 52
    assert receipt.pages_held == receipt.pages_peak == PLAN.pages(22) == 6 + 3 * 3
    assert receipt.pages_full == 6 * LANES
    assert not ledger.tokens


def test_a_peak_outlives_pages_that_were_given_back() -> None:
    ledger = Ledger(PLAN.full)
    ledger.tokens["a"] = 8
    ledger.grown("a", 100)
    ledger.close("a", PLAN, 7)
    (receipt,) = ledger.receipts(())
    assert (receipt.pages_held, receipt.pages_peak) == (7, 100)


def test_a_request_that_never_held_a_page_leaves_no_receipt() -> None:
    ledger = Ledger(PLAN.full)
    ledger.close("a", PLAN, 0)
    assert ledger.receipts(()) == []


def test_a_preempted_request_has_a_receipt_only_when_it_ends() -> None:
    ledger = Ledger(PLAN.full)
    run(ledger, "a", 22)
    ledger.close("a", PLAN, PLAN.pages(22))
    assert ledger.receipts({"a"}) == []
    run(ledger, "a", 30)
    assert ledger.receipts(()) == []
    ledger.close("a", PLAN, PLAN.pages(30))
    (receipt,) = ledger.receipts(())
    assert receipt.tokens_seen == 30


def test_evictions_of_a_preempted_request_count_each_time() -> None:
    ledger = Ledger(PLAN.full)
    run(ledger, "a", 22)
    assert ledger.evicted(36) == 36
    ledger.close("a", PLAN, 0)
    assert ledger.evicted(0) == 36
    run(ledger, "a", 22)
    assert ledger.evicted(36) == 72


def test_ranks_of_one_plan_are_added_up() -> None:
    alone, one_of_two = Ledger(PLAN.full), Ledger(PLAN.full, copies=2)
    for ledger in (alone, one_of_two):
        run(ledger, "a", 22)
        ledger.close("a", PLAN, 7)
    (single,), (both,) = alone.receipts(()), one_of_two.receipts(())
    assert both.entries_seen == 2 * single.entries_seen
    assert both.entries_retained == 2 * single.entries_retained
    assert both.entries_evicted == 2 * single.entries_evicted > 0
    assert both.pages_held == single.pages_held


def test_nothing_is_remembered_of_a_request_that_never_ran() -> None:
    ledger = Ledger(PLAN.full)
    ledger.grown("a", 100)
    ledger.close("a", PLAN, 100)
    run(ledger, "a", 22)
    ledger.close("a", PLAN, 7)
    (receipt,) = ledger.receipts(())
    assert receipt.pages_peak < 100


def test_only_the_last_receipts_are_kept_the_newest_first() -> None:
    ledger = Ledger(PLAN.full, most_receipts=3)
    for name in "abcde":
        run(ledger, name, 5)
        ledger.close(name, PLAN, 0)
    assert [receipt.request_id for receipt in ledger.receipts(())] == ["e", "d", "c"]


def test_of_a_beam_search_the_last_step_is_kept_and_pushes_nobody_out() -> None:
    ledger = Ledger(PLAN.full, most_receipts=5)
    run(ledger, "other", 5)
    ledger.close("other", PLAN, 0)
    for search in ("cmpl-a-0", "cmpl-b-0"):
        for step in range(40):
            for beam in range(2):
                name = f"{search}-{step:032x}-beam-{beam}-0123abcd"
                run(ledger, name, 5 + step)
                ledger.close(name, PLAN, 0)
    last = [
        f"{search}-{39:032x}-beam-{beam}-0123abcd"
        for search in ("cmpl-b-0", "cmpl-a-0")
        for beam in (1, 0)
    ]
    kept = ledger.receipts(())
    assert [receipt.request_id for receipt in kept] == [*last, "other"]
    assert {receipt.tokens_seen for receipt in kept[:4]} == {44}


def test_a_receipt_names_the_policy_and_what_of_it_is_no_default() -> None:
    ledger = Ledger(PLAN.full)
    run(ledger, "a", 22)
    ledger.close("a", PLAN, 7, SinkRecent(recent=64))
    (receipt,) = ledger.receipts(())
    assert (receipt.policy, receipt.arguments) == ("sink-recent", "recent=64")


def test_requests_that_ended_are_added_up_by_policy_once_each() -> None:
    ledger = Ledger(PLAN.full)
    for name, policy in (("a", SinkRecent()), ("b", SinkRecent(recent=64))):
        for _ in range(2):  # preempted once
            run(ledger, name, 22)
            ledger.close(name, PLAN, 7, policy)
        ledger.end(name)
    ledger.end("never ran")
    assert dict(ledger.ended) == {"sink-recent": Ended(2, 2 * 88, 2 * 52)}
