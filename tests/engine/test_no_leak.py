# SPDX-License-Identifier: Apache-2.0
"""However requests end, their pages come back and nobody else notices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import MIB, Engine, EngineSlot, Reply

pytestmark = pytest.mark.engine

NUM_REQUESTS = 140
AT_ONCE = 24
CHUNK = 96
POLICIES: dict[str, dict[str, Any]] = {
    "sink-recent": {"sinks": 32, "recent": 64},
    "retrieval": {"sinks": 32, "recent": 64, "full_ratio": 0.34},
    "moa": {},
    "sharded": {"local_blocks": 1, "stride": 4},
    "h2o": {"heavy": 32, "recent": 32},
    "heterogeneous": {"budget": 0.6, "sinks": 4, "recent": 32, "m": 1},
}
FAST = ("retrieval", "h2o")
"""One for each way of keeping pages; the others take as long again."""


@dataclass(frozen=True)
class Job:
    """One request and how it is to end."""

    prompt: list[int]
    max_tokens: int
    ending: str

    @property
    def sampling(self) -> dict[str, Any]:
        if self.ending == "three samples":
            return {"n": 3, "temperature": 1.0}
        if self.ending == "stop token":
            return {"stop_token_ids": list(range(0, 512, 16))}
        if self.ending == "stop string":
            return {"stop": ["1 w", "7 w"]}
        return {}

    @property
    def is_aborted(self) -> bool:
        return self.ending.startswith("abort")

    @property
    def is_greedy(self) -> bool:
        return self.ending != "three samples"


def random_jobs(vocab: int) -> Iterator[Job]:
    source = random.Random(10)
    endings = {
        "length": 5,
        "abort in prefill": 1,
        "abort in decode": 1,
        "three samples": 1,
        "stop token": 1,
        "stop string": 1,
    }
    for _ in range(NUM_REQUESTS):
        (ending,) = source.choices(list(endings), weights=list(endings.values()))
        # An abort in prefill needs a prompt of several chunks.
        shortest = 2 * CHUNK + 1 if ending == "abort in prefill" else 1
        length = source.randint(shortest, 300)
        prompt = [source.randrange(8, vocab) for _ in range(length)]
        yield Job(prompt, source.randint(8, 40), ending)


class Load:
    """Keeps an engine busy with jobs and ends each as it should."""

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self.engine = engine
        self.names: dict[str, Job] = {}
        self.aborted = {"abort in prefill": 0, "abort in decode": 0}
        self.preemptions = 0
        self._jobs = list(reversed(jobs))

    def run(self) -> None:
        while self._jobs or self.engine.is_busy:
            while self._jobs and len(self.engine.scheduler.requests) < AT_ONCE:
                job = self._jobs.pop()
                name = self.engine.add(job.prompt, job.max_tokens, **job.sampling)
                self.names[name] = job
            self.engine.step()
            self.engine.check_books()
            requests = dict(self.engine.scheduler.requests)
            for name, request in requests.items():
                self._abort_if_due(name, request)

    def _abort_if_due(self, name: str, request: Any) -> None:
        job = self.names.get(name)
        if job is None or not job.is_aborted:
            return
        computed = request.num_computed_tokens
        in_prefill = 0 < computed < request.num_prompt_tokens
        due = {
            "abort in prefill": in_prefill,
            "abort in decode": request.num_output_tokens >= 4,
        }
        if due[job.ending]:
            self.engine.abort(name)
            self.aborted[job.ending] += 1


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in POLICIES
    ],
)
def test_requests_leave_nothing_behind(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-mha"]
    engine = engines.start(
        model.path,
        policy,
        model.policy_args(policy, **POLICIES[policy]),
        max_model_len=384,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=3 * MIB,
        max_num_seqs=12,
    )
    free_at_first = engine.pool.get_num_free_blocks()
    load = Load(engine, list(random_jobs(model.vocab)))
    load.run()

    assert engine.pool.get_num_free_blocks() == free_at_first
    assert not engine.pages_held
    assert not engine.scheduler.requests
    assert all(load.aborted.values())
    replies = dict(engine.replies)
    assert sum(reply.preemptions for reply in replies.values()) > 0
    check_endings(load.names, replies)
    check_survivors(engine, load.names, replies)


def check_endings(names: dict[str, Job], replies: dict[str, Reply]) -> None:
    """Check that every way to end was taken."""
    early = {
        job.ending
        for name, job in names.items()
        if name in replies and len(replies[name].tokens) < job.max_tokens
    }
    assert {"stop token", "stop string", "abort in decode"} <= early
    parents = [name for name, job in names.items() if not job.is_greedy]
    samples = [name for name in replies if name.endswith(tuple(parents))]
    assert len(samples) == 3 * len(parents) > 0


def check_survivors(
    engine: Engine, names: dict[str, Job], replies: dict[str, Reply]
) -> None:
    """Compare every greedy reply with the one that the request gets alone."""
    survivors = [n for n, job in names.items() if job.is_greedy and not job.is_aborted]
    assert len(survivors) > NUM_REQUESTS // 2
    for name in survivors:
        job = names[name]
        (alone,) = engine.generate([job.prompt], job.max_tokens, **job.sampling)
        assert replies[name].tokens == alone.tokens
