# SPDX-License-Identifier: Apache-2.0
"""What a request gets depends on the request alone.

Not on how its prompt was cut into chunks, on who shares its batch, on who came first,
nor on whether it lost its pages on the way and was computed anew.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts

pytestmark = pytest.mark.engine

LENGTHS = [1, 31, 64, 97, 200, 333, 480, 610, 777, 900]
STEPS = 48
CHUNK = 512
LOGPROB_TOLERANCE = 1e-3
POLICIES: dict[str, dict[str, Any]] = {
    "sink-recent": {"sinks": 32, "recent": 96},
    "retrieval": {"sinks": 32, "recent": 96, "full_ratio": 0.34},
    "moa": {},
    "sharded": {"local_blocks": 2, "stride": 4, "step": 1},
    "keydiff": {"budget": 0.5, "recent": 64, "group": 64, "length": 500},
}


class Server:
    """Starts engines of one model under one policy."""

    def __init__(self, engines: EngineSlot, model: Model, policy: str) -> None:
        self._engines, self._model, self._policy = engines, model, policy
        self._policy_args = model.policy_args(policy, **POLICIES[policy])

    def start(self, chunk: int = CHUNK, **options: Any) -> Engine:
        return self._engines.start(
            self._model.path,
            self._policy,
            self._policy_args,
            max_num_batched_tokens=chunk,
            **options,
        )


@pytest.fixture(scope="module", params=POLICIES)
def server(
    engines: EngineSlot, models: dict[str, Model], request: pytest.FixtureRequest
) -> Server:
    return Server(engines, models["tiny-gqa"], request.param)


@pytest.fixture(scope="module")
def prompts(models: dict[str, Model]) -> list[list[int]]:
    return random_prompts(LENGTHS, models["tiny-gqa"].vocab, seed=2)


@pytest.fixture(scope="module")
def alone(server: Server, prompts: list[list[int]]) -> list[Reply]:
    """Every prompt by itself."""
    engine = server.start()
    return [engine.generate([prompt], STEPS)[0] for prompt in prompts]


def assert_same(found: list[Reply], expected: list[Reply]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        for best, expected_best in zip(ours.best, theirs.best, strict=True):
            token = max(best, key=best.__getitem__)
            assert abs(best[token] - expected_best[token]) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("order", ["first to last", "last to first", "shuffled"])
def test_order_of_arrival_and_neighbours_change_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply], order: str
) -> None:
    places = list(range(len(prompts)))
    if order == "last to first":
        places.reverse()
    elif order == "shuffled":
        random.Random(3).shuffle(places)
    found = server.start().generate([prompts[place] for place in places], STEPS)
    assert_same(found, [alone[place] for place in places])


def test_arriving_while_others_decode_changes_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply]
) -> None:
    engine = server.start()
    names = []
    for prompt in prompts:
        names.append(engine.add(prompt, STEPS))
        for _ in range(7):
            engine.step()
    engine.finish()
    assert_same([engine.replies.pop(name) for name in names], alone)


def test_neighbours_that_leave_change_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply]
) -> None:
    engine = server.start()
    names, leaving = [], []
    for prompt in prompts:
        leaving.append(engine.add(prompt[::-1] + prompt[:100], STEPS))
        names.append(engine.add(prompt, STEPS))
    while engine.is_busy:
        engine.step()
        if leaving and engine.replies[leaving[0]].tokens:
            engine.abort(leaving.pop(0))
    assert_same([engine.replies.pop(name) for name in names], alone)


@pytest.mark.parametrize("chunk", [64, 100, 2048])
def test_chunk_size_changes_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply], chunk: int
) -> None:
    assert_same(server.start(chunk).generate(prompts, STEPS), alone)


def test_preemption_and_recomputation_change_nothing(
    server: Server, models: dict[str, Model]
) -> None:
    # Short prompts and long answers: all fit at first, then they grow.
    prompts = random_prompts(
        [5, 20, 31, 33, 64, 100, 300, 700], models["tiny-gqa"].vocab, seed=6
    )
    steps = 3 * PAGE + 5
    roomy = server.start()
    expected = [roomy.generate([prompt], steps)[0] for prompt in prompts]
    assert not any(reply.preemptions for reply in expected)
    tight = server.start(chunk=128, kv_cache_memory_bytes=2 * MIB)
    names = [tight.add(prompt, steps) for prompt in prompts]
    answers_cut = set()
    while tight.is_busy:
        tight.step()
        answers_cut |= {
            request.request_id
            for request in tight.scheduler.waiting
            if request.num_preemptions and request.num_output_tokens
        }
    found = [tight.replies.pop(name) for name in names]
    assert sum(reply.preemptions for reply in found) >= len(answers_cut) > 0
    assert_same(found, expected)


def test_preempting_everybody_at_once_changes_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply]
) -> None:
    engine = server.start()
    names = [engine.add(prompt, STEPS) for prompt in prompts]
    for steps in (3, 17, 20):
        for _ in range(steps):
            engine.step()
        # The next step has the same requests in the same rows, but other pages.
        engine.preempt_all()
    engine.finish()
    found = [engine.replies.pop(name) for name in names]
    assert sum(reply.preemptions for reply in found) > 3
    assert_same(found, alone)


def test_pages_that_others_wrote_before_change_nothing(
    server: Server, prompts: list[list[int]], alone: list[Reply]
) -> None:
    engine = server.start()
    # The pool's pages are now full of other requests' keys.
    engine.generate(random_prompts([900] * 16, 512, seed=4), PAGE)
    assert_same(engine.generate(prompts, STEPS), alone)
