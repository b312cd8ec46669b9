# SPDX-License-Identifier: Apache-2.0
"""What requests of many policies hold is counted, bounded and given back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from kvserve.errors import UserError
from kvserve.plan.rule import RequestPlan, rule_under
from policies.registry import create_policy
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, random_prompts
from tests.engine.mixed_policies import KINDS, LENGTHS, STEPS, mixture, sampling, start

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny-gqa"]


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return random_prompts(LENGTHS, model.vocab, seed=21)


def plan_of(model: Model, text: str | None, prompt_tokens: int) -> RequestPlan:
    """The plan of a request on a server of its policy alone."""
    name, arguments = KINDS[text]
    policy = create_policy(name, model.policy_args(name, **arguments))
    rule = rule_under(policy, model.shape, PAGE, model.shape.max_tokens)
    return rule.of_request(prompt_tokens, STEPS)


def test_each_request_holds_the_pages_of_its_own_plan_at_every_step(
    engines: EngineSlot, model: Model, prompts: list[list[int]]
) -> None:
    engine = start(engines, model, chunk=100)
    expected = {
        engine.add(prompts[i], STEPS, **sampling(text)): (
            text,
            plan_of(model, text, len(prompts[i])),
        )
        for i, text in mixture(2)
    }
    seen = set()
    while engine.is_busy:
        engine.step()
        rows = engine._core.kvserve_report()["cache"]["requests"]
        for row in rows:
            text, plan = expected[row["request_id"]]
            tokens = row["tokens_seen"]
            # What a prompt that is just read leaves behind goes at the next step.
            count = plan.entries if plan.is_reading(tokens) else plan.pages
            assert row["pages_held"] == count(tokens)
            assert row["dense_prefill"] == plan.is_reading(tokens)
            lanes = plan.lane_tokens(tokens)
            assert row["entries_retained"] == lanes.sum()
            assert row["policy"] == KINDS[text][0]
            seen.add(text)
        # Page 0 is null: it stands where pages were given back.
        listed = sum(map(np.count_nonzero, engine.pages_held.values()))
        assert sum(row["pages_held"] for row in rows) == listed
    assert seen == set(KINDS)


def test_receipts_and_totals_name_the_policy(
    engines: EngineSlot, model: Model, prompts: list[list[int]]
) -> None:
    engine = start(engines, model)
    before = ended(engine)
    names = {engine.add(prompts[8], STEPS, **sampling(text)): text for text in KINDS}
    for _ in range(10):
        engine.step()
    engine.preempt_all()
    engine.finish()
    receipts = {one["request_id"]: one for one in engine._core.kvserve_receipts()}
    for name, text in names.items():
        policy, arguments = KINDS[text]
        assert receipts[name]["policy"] == policy
        for key, value in arguments.items():
            default = (key, value) == ("sinks", 32)
            assert (f"{key}={value}" in receipts[name]["arguments"]) != default
    after = ended(engine)
    gained = {policy: after[policy] - before.get(policy, 0) for policy in after}
    # A request that was preempted on its way has ended once.
    assert gained == Counter(policy for policy, _ in KINDS.values())


def ended(engine: Engine) -> dict[str, int]:
    totals = engine._core.kvserve_report()["cache"]["ended"]
    return {policy: total["requests"] for policy, total in totals.items()}


def test_the_pool_must_hold_a_full_request_and_does(
    engines: EngineSlot, model: Model
) -> None:
    # Six lanes of 32 pages, scratch for chunks of 64 tokens, and page 0.
    pages = 6 * 32 + (64 // PAGE + 2) * 2 + 1
    size = pages * 2 * PAGE * 64 * 4
    options = {"max_num_seqs": 2, "kv_cache_memory_bytes": size}
    engine = start(engines, model, chunk=64, **options)
    assert engine.pages_for_requests == 6 * 32
    (prompt,) = random_prompts([1000], model.vocab, seed=3)
    names = [engine.add(prompt, 24, **sampling(text)) for text in ("full", None)]
    engine.finish()
    assert [len(engine.replies.pop(name).tokens) for name in names] == [24, 24]
    engines.close()
    with pytest.raises(UserError, match="under `full`"):
        start(engines, model, 64, **options | {"kv_cache_memory_bytes": size - 1})


class Crowd:
    """Requests of mixed policies, some of which are aborted on the way."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self.engine, self.random = engine, random.Random(22)
        self.texts = [*KINDS, "sink-recent:budget=0.7"]
        self.vocab = model.vocab
        self.running: dict[str, int] = {}
        self.aborted = self.added = 0

    def jobs(self, count: int) -> Iterator[str]:
        for _ in range(count):
            (prompt,) = random_prompts(
                [self.random.randint(100, 300)], self.vocab, self.random.random()
            )
            values = {"n": 2, "temperature": 1.0} if self.random.random() < 0.1 else {}
            text = self.random.choice(self.texts)
            yield self.engine.add(
                prompt, self.random.randint(4, 40), **sampling(text, **values)
            )

    def run(self, count: int) -> None:
        jobs = self.jobs(count)
        exhausted = False
        while not exhausted or self.engine.is_busy:
            while not exhausted and len(self.engine.scheduler.requests) < 20:
                exhausted = next(jobs, None) is None
            self.engine.step()
            for name in list(self.engine.scheduler.requests):
                if self.random.random() < 0.02:
                    self.engine.abort(name)
                    self.aborted += 1


def test_two_hundred_mixed_requests_leave_nothing_behind(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(
        engines,
        model,
        chunk=96,
        max_model_len=384,
        max_num_seqs=12,
        kv_cache_memory_bytes=3 * MIB,
    )
    free_at_first = engine.pool.get_num_free_blocks()
    crowd = Crowd(engine, model)
    crowd.run(200)
    engine.generate([[5, 6, 7]], 3)  # the worker hears of the last to end
    assert crowd.aborted > 20
    assert sum(reply.preemptions for reply in engine.replies.values()) > 0
    assert engine.pool.get_num_free_blocks() == free_at_first
    assert not engine.pages_held
    assert not engine.scheduler.requests
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not manager._plans
    assert not manager._named
    tables = engine._core.model_executor.driver_worker.worker._builder.tables
    assert len(tables._plans) <= 1
