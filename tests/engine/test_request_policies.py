# SPDX-License-Identifier: Apache-2.0
"""Requests that name policies of their own share an engine and notice nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from kvserve.errors import UserError
from kvserve.plan.rule import RequestPlan, rule_under
from policies.registry import create_policy
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_isolation import assert_same

pytestmark = pytest.mark.engine

LENGTHS = [1, 31, 64, 97, 200, 333, 480, 610, 777, 900]
STEPS = 2 * PAGE + 8
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "sink-recent:sinks=32,recent=64": ("sink-recent", {"sinks": 32, "recent": 64}),
    "streaming-llm:recent=160": ("sink-recent", {"recent": 160}),
    "retrieval:full_ratio=0.5,recent=64": (
        "retrieval",
        {"full_ratio": 0.5, "recent": 64},
    ),
}
SELECTING: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv:capacity=64,window=16": ("snapkv", {"capacity": 64, "window": 16}),
    "h2o:heavy=64,recent=64": ("h2o", {"heavy": 64, "recent": 64}),
}
SERVER: tuple[str, dict[str, Any]] = "retrieval", {"full_ratio": 0.34, "recent": 96}
"""What requests get that name nothing."""
KINDS: dict[str | None, tuple[str, dict[str, Any]]]
KINDS = {None: SERVER, **NAMED, **SELECTING}
SHAREABLE = [text for text in KINDS if text not in SELECTING]


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny-gqa"]


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return random_prompts(LENGTHS, model.vocab, seed=21)


@pytest.fixture(scope="module")
def alone(
    engines: EngineSlot, model: Model, prompts: list[list[int]]
) -> dict[str | None, list[Reply]]:
    """Every prompt under every policy, on a server of that policy alone."""
    replies = {}
    for text, (policy, arguments) in KINDS.items():
        engine = engines.start(
            model.path, policy, model.policy_args(policy, **arguments)
        )
        replies[text] = engine.generate(prompts, STEPS)
    return replies


def start(
    engines: EngineSlot, model: Model, chunk: int = 512, **options: Any
) -> Engine:
    policy, arguments = SERVER
    return engines.start(
        model.path,
        policy,
        model.policy_args(policy, **arguments),
        allow_request_policies=True,
        max_num_batched_tokens=chunk,
        **options,
    )


def sampling(text: str | None, **values: Any) -> dict[str, Any]:
    return {**values, **({"extra_args": {"kv_policy": text}} if text else {})}


def mixture(
    seed: int, texts: Iterable[str | None] = KINDS
) -> list[tuple[int, str | None]]:
    """Every prompt under every policy, shuffled."""
    pairs = [(place, text) for place in range(len(LENGTHS)) for text in texts]
    random.Random(seed).shuffle(pairs)
    return pairs


def plan_of(model: Model, text: str | None, prompt_tokens: int) -> RequestPlan:
    """The plan of a request on a server of its policy alone."""
    name, arguments = KINDS[text]
    policy = create_policy(name, model.policy_args(name, **arguments))
    rule = rule_under(policy, model.shape, PAGE, model.shape.max_tokens)
    return rule.of_request(prompt_tokens, STEPS)


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_mixed_policies_answer_as_servers_of_one_policy_do(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
    chunk: int,
) -> None:
    engine = start(engines, model, chunk)
    pairs = mixture(chunk)
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    engine.finish()
    found = [engine.replies.pop(name) for name in names]
    assert_same(found, [alone[text][i] for i, text in pairs])


def test_cached_prefixes_are_those_of_the_same_policy(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    engine = start(engines, model, 100, enable_prefix_caching=True)
    pairs = mixture(3, SHAREABLE)
    expected = [alone[text][i] for i, text in pairs]
    for is_cached in (False, True):
        names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
        engine.finish()
        found = [engine.replies.pop(name) for name in names]
        assert_same(found, expected)
        for (place, _), reply in zip(pairs, found, strict=True):
            assert (reply.cached > 0) == (is_cached and LENGTHS[place] > PAGE)
    with pytest.raises(UserError, match="snapkv: keeps of a prefix what the text"):
        engine.add([5, 6, 7], 4, **sampling("snapkv"))


def test_the_policies_of_this_test_answer_differently(
    alone: dict[str | None, list[Reply]],
) -> None:
    answers = {text: [reply.tokens for reply in alone[text]] for text in alone}
    assert len({str(answer) for answer in answers.values()}) == len(KINDS)


def test_preempted_requests_keep_their_policies(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    # Barely more than one full request of the longest length, and scratch.
    engine = start(engines, model, chunk=128, kv_cache_memory_bytes=4 * MIB)
    pairs = mixture(1)
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    engine.finish()
    found = [engine.replies.pop(name) for name in names]
    assert sum(reply.preemptions for reply in found) > 3
    assert_same(found, [alone[text][i] for i, text in pairs])


def test_preempting_everybody_at_once_changes_nothing(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    engine = start(engines, model)
    pairs = [(place, text) for place in (3, 8) for text in KINDS]
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    for steps in (3, 9, 15):
        for _ in range(steps):
            engine.step()
        engine.preempt_all()
    engine.finish()
    assert_same(
        [engine.replies.pop(name) for name in names],
        [alone[text][i] for i, text in pairs],
    )


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


@pytest.mark.parametrize("server", ["full", "moa", "sharded", "h2o"])
def test_servers_of_other_policies_mix_them_too(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
    server: str,
) -> None:
    values = {"local_blocks": 2, "stride": 4} if server == "sharded" else {}
    arguments = model.policy_args(server, **values)
    own = engines.start(model.path, server, arguments).generate(prompts, STEPS)
    engine = engines.start(model.path, server, arguments, allow_request_policies=True)
    # Of its own class a request gets the server's file, and the parameters it names.
    same = {
        "moa": "moa:length=1024",
        "sharded": None,
        "full": "full:budget=1",
        "h2o": "h2o:heavy=64,recent=64",
    }[server]
    texts = [None, "full", "streaming-llm:recent=160", "snapkv:capacity=64,window=16"]
    texts.append(same)
    pairs = [(place, text) for place in range(len(LENGTHS)) for text in texts]
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    engine.finish()
    for name, (i, text) in zip(names, pairs, strict=True):
        reply = engine.replies.pop(name)
        if text is None or (server == "full" and text == same):
            assert_same([reply], [own[i]])
        elif text in alone:
            assert_same([reply], [alone[text][i]])
    with pytest.raises(UserError, match="turns of 8 pages"):
        engine.add(
            [1], 1, **sampling("sharded:block=32,insist=true,stride=8,local_blocks=2")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "'nothing': is no policy; name one of full"),
        ("snapkv:window=0", "window=0: must be between 1 and 512"),
        ("retrieval:profile=/etc/passwd", "profile: a request sets numbers"),
        ("sink-recent:recent=0", "recent=0: must be at least 1"),
        ("sink-recent:budget=0.01", "less than the 64 tokens"),
        (7, "expected a text NAME"),
    ],
)
def test_an_unusable_policy_is_refused_before_the_engine_sees_it(
    engines: EngineSlot, model: Model, text: str, message: str
) -> None:
    engine = start(engines, model)
    with pytest.raises(UserError, match=message):
        engine.add([5, 6, 7], 4, **sampling(text))
    assert not engine.is_busy
    assert not engine.scheduler.requests


def test_without_the_flag_a_named_policy_is_refused(
    engines: EngineSlot, model: Model
) -> None:
    engine = engines.start(model.path, "full")
    with pytest.raises(UserError, match="without --allow-request-policies"):
        engine.add([5, 6, 7], 4, **sampling("full"))
    stock = engines.start(model.path, None)
    with pytest.raises(UserError, match="stock vLLM"):
        stock.add([5, 6, 7], 4, **sampling("full"))


def test_what_cannot_be_mixed_is_refused_at_start(model: Model) -> None:
    from kvserve import LLM

    cases: list[tuple[str | None, dict[str, Any], str]] = [
        (None, {}, "--allow-request-policies: --policy none"),
        ("full", {"scheduler_cls": "a.B"}, "--scheduler-cls=a.B: --allow-request"),
        (
            "sink-recent",
            {"max_model_len": 4096, "kv_cache_memory_bytes": 4 * MIB},
            "needs .* under `full`, which --allow-request-policies lets it name",
        ),
    ]
    for policy, options, message in cases:
        with pytest.raises(UserError, match=message):
            LLM(str(model.path), policy=policy, allow_request_policies=True, **options)


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
