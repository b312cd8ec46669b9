# SPDX-License-Identifier: Apache-2.0
"""What the engine core reports at every step, against its pool and the rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvserve.plan.page_plan import PagePlan
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, random_prompts
from tests.engine.test_no_leak import POLICIES as SOME_POLICIES
from tests.reference.visibility import visible_positions

pytestmark = pytest.mark.engine

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "snapkv": {"capacity": 64, "window": 16},
    **SOME_POLICIES,
}


def report(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine._core.kvserve_report()
    return found


def receipts(engine: Engine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine._core.kvserve_receipts()
    return found


def start(engines: EngineSlot, model: Model, policy: str, **options: Any) -> Engine:
    arguments = model.policy_args(policy, **POLICIES[policy])
    options = {"max_num_batched_tokens": 100, "max_num_seqs": 6, **options}
    return engines.start(model.path, policy, arguments, **options)


def check_pool(engine: Engine, found: dict[str, Any]) -> None:
    """Every page that is not free is held by a request that says so."""
    held = {row["request_id"]: row["pages_held"] for row in found["cache"]["requests"]}
    engine.check_books()
    assert held == {name: engine.manager.pages_held(name) for name in engine.pages_held}
    assert sum(held.values()) == found["pages_total"] - found["pages_free"]
    assert found["pages_total"] == engine.pages_for_requests
    retained = sum(row["entries_retained"] for row in found["cache"]["requests"])
    assert retained == np.sum(found["cache"]["entries_retained"])
    assert retained <= sum(held.values()) * PAGE


@pytest.mark.parametrize("policy", POLICIES)
def test_reported_pages_are_those_of_the_pool_at_every_step(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, policy, kv_cache_memory_bytes=6 * MIB)
    before = {receipt["request_id"] for receipt in receipts(engine)}
    evicted = report(engine)["cache"]["entries_evicted"]
    prompts = random_prompts([1, 33, 150, 260, 400, 31], model.vocab, seed=11)
    names = {engine.add(prompt, 60): len(prompt) for prompt in prompts}
    most_full = 0
    while engine.is_busy:
        engine.step()
        found = report(engine)
        check_pool(engine, found)
        now = found["cache"]["entries_evicted"]
        assert now >= evicted
        evicted = now
        most_full = max(most_full, found["cache"]["dense_prefill_pages"])
    assert (most_full > 0) == (policy in ("snapkv", "h2o", "heterogeneous"))
    check_receipts(engine, names, before)
    idle = report(engine)
    assert idle["pages_free"] == idle["pages_total"]
    assert idle["cache"]["requests"] == []
    assert (evicted > 0) == (policy != "full")


def check_receipts(engine: Engine, names: dict[str, int], before: set[str]) -> None:
    new = [one for one in receipts(engine) if one["request_id"] not in before]
    assert {one["request_id"] for one in new} == set(names)
    for one in new:
        # The last token of a reply is never read back.
        assert one["tokens_seen"] == names[one["request_id"]] + 59
        evicted = one["entries_seen"] - one["entries_retained"]
        assert one["entries_evicted"] == evicted >= 0
        assert 0 < one["pages_held"] <= one["pages_peak"]
        assert one["entries_retained"] <= one["pages_held"] * PAGE
    assert report(engine)["cache"]["entries_evicted"] >= sum(
        one["entries_evicted"] for one in new
    )


@pytest.mark.parametrize("policy", ["sink-recent", "retrieval", "sharded"])
def test_retained_tokens_of_every_head_are_those_that_the_rule_shows(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, policy)
    arguments = model.policy_args(policy, **POLICIES[policy])
    plan = PagePlan.from_budgets(model.budgets(policy, arguments), PAGE)
    for prompt in random_prompts([333, 90, 200], model.vocab, seed=12):
        engine.add(prompt, 40)
    for _ in range(20):
        engine.step()
    found = report(engine)["cache"]
    lengths = [row["tokens_seen"] for row in found["requests"]]
    assert len(lengths) == 3
    expected = [
        [
            sum(len(visible_positions(plan, layer, head, n - 1)) for n in lengths)
            for head in range(plan.num_kv_heads)
        ]
        for layer in range(plan.num_layers)
    ]
    assert found["entries_retained"] == expected
    assert found["entries_seen"] == sum(lengths) * plan.num_lanes
    engine.finish()


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "heterogeneous"])
def test_retained_tokens_of_every_head_are_those_in_its_pages(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-mha"]
    engine = start(engines, model, policy)
    for prompt in random_prompts([333, 90, 200], model.vocab, seed=13):
        engine.add(prompt, 40)
    for _ in range(30):
        engine.step()
    held = engine.retained()
    assert len(held) == 3
    by_head = sum(
        np.array([[len(head) for head in layer] for layer in heads])
        for _, heads in held.values()
    )
    found = report(engine)["cache"]
    assert found["entries_retained"] == by_head.tolist()
    assert found["selection_seconds"] > 0
    assert found["compaction_seconds"] > 0
    engine.finish()


def test_a_preempted_request_is_neither_running_nor_ended(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, "sink-recent")
    (prompt,) = random_prompts([200], model.vocab, seed=14)
    name = engine.add(prompt, 40)
    for _ in range(10):
        engine.step()
    assert [row["request_id"] for row in report(engine)["cache"]["requests"]] == [name]
    engine.preempt_all()
    assert report(engine)["cache"]["requests"] == []
    assert name not in [one["request_id"] for one in receipts(engine)]
    engine.finish()
    assert name in [one["request_id"] for one in receipts(engine)]


def test_stock_vllm_reports_its_pool_and_no_receipts(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    engine = engines.start(models["tiny-gqa"].path, None)
    found = report(engine)
    assert found["cache"] is None
    assert found["pages_total"] == found["pages_free"] > 0
    assert engine._core.kvserve_receipts() is None


def test_prefixes_that_requests_share_do_not_pass_for_compression(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, "full", enable_prefix_caching=True)
    stem, *ends = random_prompts([4 * PAGE, 5, 40, 70], model.vocab, seed=14)
    engine.generate([[*stem, 9]], 1)
    for end in ends:
        engine.add(stem + end, 20)
    for _ in range(10):
        engine.step()
    found = report(engine)
    lanes = engine.rule.full.num_lanes
    listed = sum(row["pages_held"] for row in found["cache"]["requests"])
    held = found["pages_total"] - found["pages_free"]
    assert listed - held == 2 * 4 * lanes
    assert found["cache"]["pages_full"] == held
    engine.finish()
    assert [one["tokens_cached"] for one in receipts(engine)[:3]] == [4 * PAGE] * 3
