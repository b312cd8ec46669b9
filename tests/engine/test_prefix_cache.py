# SPDX-License-Identifier: Apache-2.0
"""Replies from cached pages are those of a server that computes everything."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import check_start
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.pool_audit import PoolAudit

pytestmark = pytest.mark.engine

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"sinks": 32, "recent": 96},
    "retrieval": {"sinks": 32, "recent": 96, "full_ratio": 0.34},
    "moa": {},
    "sharded": {"local_blocks": 2, "stride": 4, "step": 1},
    "keydiff": {"budget": 0.6, "recent": 64, "group": 64, "length": 448},
}
LONGEST = 448
SETTINGS: dict[str, list[tuple[int, int]]] = {
    "some": [(48, 8), (96, 3)],
    "many": [(33, 3), (64, 2), (256, 4), (512, 16)],
}
"""Tokens of a step and MiB of the pool; the smaller pools evict all the time."""
SCENARIOS = 10
REPLY = 12


@dataclass(frozen=True)
class Job:
    """A prompt and what a server without a prefix cache replies."""

    prompt: list[int]
    reply: list[int]


class AuditedEngine:
    """An engine whose pool is checked around every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._audit = PoolAudit(engine.manager, engine.scheduler.requests)
        self._written: set[int] = set()
        rows = engine.builder._rows
        build = rows.build

        def watched(*args: Any) -> Any:
            step = build(*args)
            slots = [step.slots.ravel()]
            slots += [t for one in engine.builder.tables.leaving for t in one.targets]
            self._written = {slot // PAGE for slot in np.concatenate(slots).tolist()}
            return step

        rows.build = watched

    def step(self) -> None:
        self._written = set()
        self._audit.begin_step()
        self.engine.step()
        self._audit.end_step(self._written)


def start(
    engines: EngineSlot, model: Model, policy: str, chunk: int, mib: int, **options: Any
) -> Engine:
    return engines.start(
        model.path,
        policy,
        model.policy_args(policy, **POLICIES[policy]),
        max_num_batched_tokens=chunk,
        kv_cache_memory_bytes=mib * MIB,
        max_model_len=LONGEST + 32,
        **{"max_num_seqs": 6, "enable_prefix_caching": True, **options},
    )


def jobs_of(engine: Engine, vocab: int, source: random.Random) -> list[Job]:
    """Prompts with common beginnings, and chats whose turns follow from replies."""
    stems = random_prompts([LONGEST] * 2, vocab, seed=source.randrange(1000))

    def cut() -> list[int]:
        stem = source.choice(stems)[: source.randint(1, 300)]
        own = random_prompts([source.choice([0, 5, 40])], vocab, source.randrange(1000))
        return stem + own[0]

    prompts = [cut() for _ in range(14)]
    # Equal lengths, so that requests of an elastic policy have equal plans.
    prompts += [
        stems[0][:200] + random_prompts([17], vocab, seed)[0] for seed in range(6)
    ]
    jobs: list[Job] = []
    for _ in range(3):
        replies = engine.generate(prompts, REPLY)
        new = [
            Job(prompt, reply.tokens)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        jobs += new
        turn = random_prompts([source.randint(1, 40)], vocab, source.randrange(1000))[0]
        prompts = [
            job.prompt + job.reply + turn
            for job in source.sample(new, 6)
            if len(job.prompt) + REPLY + len(turn) < LONGEST - REPLY
        ]
    return jobs


def run_scenario(
    audited: AuditedEngine, jobs: list[Job], source: random.Random
) -> list[Reply]:
    """Run some jobs that arrive while others run, and some that are aborted."""
    engine, names, doomed = audited.engine, {}, []
    for job in source.choices(jobs, k=5):
        names[engine.add(job.prompt, REPLY, logprobs=None)] = job
        if source.random() < 0.3:
            doomed.append(engine.add(source.choice(jobs).prompt, REPLY, logprobs=None))
        for _ in range(source.choice([0, 0, 1, 3, 9])):
            audited.step()
    while engine.is_busy:
        audited.step()
        if doomed and source.random() < 0.5:
            engine.abort(doomed.pop())
    for name, job in names.items():
        assert engine.replies[name].tokens == job.reply
    return [engine.replies.pop(name) for name in names]


@pytest.mark.parametrize(
    "settings", ["some", pytest.param("many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(
            pytest.param(
                "tiny-gqa",
                policy,
                marks=pytest.mark.slow if policy in ("sharded", "moa") else (),
            )
            for policy in POLICIES
        ),
        *((name, "retrieval") for name in ("tiny-window", "tiny-chunk")),
    ],
)
def test_any_load_gets_the_replies_that_it_gets_without_a_cache(
    engines: EngineSlot,
    models: dict[str, Model],
    name: str,
    policy: str,
    settings: str,
) -> None:
    model, source = models[name], random.Random(20)
    plain = start(engines, model, policy, 512, 32, enable_prefix_caching=False)
    jobs = jobs_of(plain, model.vocab, source)
    replies: list[Reply] = []
    for chunk, mib in SETTINGS[settings]:
        engine = start(engines, model, policy, chunk, mib)
        audited = AuditedEngine(engine)
        for number in range(SCENARIOS):
            replies += run_scenario(audited, jobs, random.Random(number))
        assert engine.pool.get_num_free_blocks() == engine.pages_for_requests
    hits = [reply.cached for reply in replies if reply.cached]
    assert len(hits) > len(replies) // 4
    assert len(set(hits)) > 3


@pytest.mark.parametrize("policy", ["full", "retrieval"])
def test_preempted_requests_come_back_by_the_cache_and_go_on(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model, steps = models["tiny-gqa"], 3 * PAGE + 5
    (stem,) = random_prompts([100], model.vocab, seed=28)
    own = random_prompts([5, 20, 60, 90, 120, 200], model.vocab, seed=29)
    prompts = [stem[: 20 * n] + ids for n, ids in enumerate(own)]
    plain = start(engines, model, policy, 512, 32, enable_prefix_caching=False)
    expected = plain.generate(prompts, steps)
    engine = start(engines, model, policy, 64, 2)
    audited = AuditedEngine(engine)
    names = [engine.add(prompt, steps) for prompt in prompts]
    while engine.is_busy:
        audited.step()
    replies = [engine.replies.pop(name) for name in names]
    assert sum(reply.preemptions for reply in replies) > 0
    assert [r.tokens for r in replies] == [r.tokens for r in expected]


def test_a_system_prompt_is_read_once(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model, blocks = models["tiny-gqa"], 9
    engine = start(engines, model, "retrieval", 256, 16, disable_log_stats=False)
    names = "vllm:prefix_cache_queries", "vllm:prefix_cache_hits"
    before = [engine.gauge(name) for name in names]
    (system,) = random_prompts([blocks * PAGE], model.vocab, seed=30)
    questions = random_prompts(range(1, 31), model.vocab, seed=31)
    engine.generate([system + questions[0]], REPLY)
    replies = engine.generate([system + own for own in questions[1:]], REPLY)
    assert [reply.cached for reply in replies] == [len(system)] * len(replies)
    queries, hits = (
        engine.gauge(name) - old for name, old in zip(names, before, strict=True)
    )
    assert hits == len(system) * len(replies)
    assert queries == sum(len(system) + len(own) for own in questions)


@pytest.mark.parametrize("policy", ["full", "retrieval"])
def test_samples_of_one_prompt_hold_one_copy_of_it(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model, samples, blocks = models["tiny-gqa"], 4, 9
    engine = start(engines, model, policy, 512, 16)
    (prompt,) = random_prompts([blocks * PAGE + 7], model.vocab, seed=32)
    engine.add(prompt, REPLY, n=samples, temperature=1.0, logprobs=None)
    engine.step()
    # All are read in one step: the first fills the pages that the others start with.
    lists = list(engine.pages_held.values())
    assert len(lists) == samples
    engine.step()
    lists = list(engine.pages_held.values())
    lanes = engine.rule.longest.num_lanes
    whole = [pages[: blocks * lanes] for pages in lists]
    assert all(pages == whole[0] for pages in whole)
    own = [pages[blocks * lanes :] for pages in lists]
    assert [len(pages) for pages in own] == [lanes] * samples
    held = {page for pages in lists for page in pages if page}
    one = engine.rule.longest.pages(len(prompt) + 1)
    assert len(held) == one + (samples - 1) * lanes
    assert engine.pool.get_num_free_blocks() == engine.pages_for_requests - len(held)
    engine.finish()


@pytest.mark.parametrize("policy", ["full", "retrieval"])
def test_beams_read_their_prompt_once(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model, beams, blocks = models["tiny-gqa"], 3, 9
    (prompt,) = random_prompts([blocks * PAGE + 7], model.vocab, seed=36)
    plain = start(engines, model, policy, 512, 16, enable_prefix_caching=False)
    expected = plain.beams(prompt, beams, REPLY)
    engine = start(engines, model, policy, 512, 16)
    engine.replies.clear()
    assert engine.beams(prompt, beams, REPLY) == expected
    cached = [reply.cached for reply in engine.replies.values()]
    assert cached == [0] + [blocks * PAGE] * ((REPLY - 1) * beams)
    assert engine.pages_held == {}


@pytest.mark.parametrize("policy", ["retrieval", "moa", "sharded"])
def test_equal_prompts_of_one_step_get_one_reply(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-gqa"]
    (prompt,) = random_prompts([9 * PAGE + 7], model.vocab, seed=33)
    plain = start(engines, model, policy, 512, 16, enable_prefix_caching=False)
    (expected,) = plain.generate([prompt], REPLY)
    engine = start(engines, model, policy, 512, 16)
    replies = engine.generate([prompt] * 4, REPLY)
    assert [reply.cached for reply in replies] == [0] + [9 * PAGE] * 3
    assert all(reply.tokens == expected.tokens for reply in replies)


def test_requests_of_unequal_spans_do_not_share(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, "moa", 512, 16)
    (prompt,) = random_prompts([200], model.vocab, seed=34)
    lengths = [REPLY, 200, REPLY, 200]
    plans = [engine.rule.plan(len(prompt) + length) for length in lengths]
    assert plans[0] != plans[1]
    replies = [engine.generate([prompt], length)[0] for length in lengths]
    assert [reply.cached for reply in replies] == [0, 0, 6 * PAGE, 6 * PAGE]
    assert replies[0].tokens == replies[2].tokens
    assert replies[1].tokens == replies[3].tokens


def test_a_reset_cache_is_empty_and_running_requests_start_anew(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, "retrieval", 512, 16)
    audited = AuditedEngine(engine)
    (prompt,) = random_prompts([300], model.vocab, seed=35)
    (expected,) = engine.generate([prompt], 40)
    names = [engine.add(prompt, 40) for _ in range(2)]
    for _ in range(5):
        audited.step()
    engine.preempt_all()
    while engine.is_busy:
        audited.step()
    replies = [engine.replies.pop(name) for name in names]
    assert all(reply.tokens == expected.tokens for reply in replies)
    assert engine.scheduler.reset_prefix_cache()
    (reply,) = engine.generate([prompt], 4)
    assert reply.cached == 0


def test_a_report_counts_a_shared_page_once(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = start(engines, model, "full", 512, 16)
    (prompt,) = random_prompts([300], model.vocab, seed=36)
    for _ in range(3):
        engine.add(prompt, REPLY)
    for _ in range(2):
        engine.step()
    found = engine._core.kvserve_report()
    distinct = {page for pages in engine.pages_held.values() for page in pages}
    assert found["pages_total"] - found["pages_free"] == len(distinct)
    held = [row["pages_held"] for row in found["cache"]["requests"]]
    assert held == [engine.rule.longest.pages(301)] * 3
    usage = engine.scheduler.kv_cache_manager.usage
    assert usage == pytest.approx(len(distinct) / engine.pages_for_requests)
    engine.finish()


@pytest.mark.parametrize(("kib", "shares"), [(1500, False), (4000, True)])
def test_a_pool_without_room_for_a_step_is_served_without_sharing(
    models: dict[str, Model],
    kib: int,
    shares: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = engine_options(
        PolicySettings("sink-recent", {"recent": 96}),
        {
            "model": str(models["tiny-gqa"].path),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": kib << 10,
        },
    )
    config = check_start(options)
    assert options["enable_prefix_caching"] is shares
    assert config.cache_config.enable_prefix_caching is shares
    assert ("no room" in capfd.readouterr().err) is not shares
