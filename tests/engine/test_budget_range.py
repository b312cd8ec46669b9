# SPDX-License-Identifier: Apache-2.0
"""Requests whose budgets follow the load answer as on servers of one budget."""

from __future__ import annotations

import random
from typing import Any

import pytest

from policies.base import Policy
from tests.engine.conftest import Model
from tests.engine.harness import MIB, Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_isolation import assert_same

pytestmark = pytest.mark.engine

STEPS = 40
LENGTHS = [64, 200, 333, 480, 610, 777, 900]
RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "keydiff": (
        "100%..45%",
        {"recent": 64, "group": 64, "length": 700},
    ),
    "sink-recent": ("400..100", {}),
}


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny-gqa"]


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return random_prompts(LENGTHS, model.vocab, seed=31)


class Servers:
    """Starts engines of one policy, under a range of budgets and under one of them."""

    def __init__(self, engines: EngineSlot, model: Model, policy: str) -> None:
        self._engines, self._model, self.policy = engines, model, policy
        self._range, self._own = RANGES[policy]

    def start(self, chunk: int = 200, **options: Any) -> Engine:
        values = self._model.policy_args(self.policy, **self._own, budget=self._range)
        return self._start(values, chunk, **options)

    def start_as(self, policy: Policy) -> Engine:
        """Start a server whose requests all have this policy."""
        given = vars(policy).items()
        return self._start({key: one for key, one in given if one is not None})

    def _start(
        self, values: dict[str, Any], chunk: int = 200, **options: Any
    ) -> Engine:
        options["max_num_batched_tokens"] = chunk
        return self._engines.start(self._model.path, self.policy, values, **options)


@pytest.fixture(params=RANGES)
def servers(
    engines: EngineSlot, model: Model, request: pytest.FixtureRequest
) -> Servers:
    return Servers(engines, model, request.param)


def expected_of(
    servers: Servers, prompts: list[list[int]], rules: list[Any]
) -> list[Reply]:
    """What requests with these rules answer where nobody has another budget."""
    replies: dict[int, Reply] = {}
    for rule in set(rules):
        policy = rule.policy
        arguments = {
            key: value for key, value in vars(policy).items() if value is not None
        }
        engine = servers._engines.start(
            servers._model.path, servers.policy, arguments, max_num_batched_tokens=200
        )
        own = [place for place, one in enumerate(rules) if one == rule]
        found = engine.generate([prompts[place] for place in own], STEPS)
        replies |= dict(zip(own, found, strict=True))
    return [replies[place] for place in range(len(rules))]


def ask(
    engine: Engine, prompts: list[list[int]], preempt_at: tuple[int, ...] = ()
) -> tuple[list[Reply], list[Any]]:
    """Ask in waves that grow, so that budgets differ; return replies and rules."""
    names: list[str] = []
    rules: dict[str, Any] = {}
    step, wave = 0, 0
    while len(names) < len(prompts) or engine.is_busy:
        if step % 4 == 0:
            wave += 1
            coming = prompts[len(names) : len(names) + wave]
            names += [engine.add(prompt, STEPS) for prompt in coming]
        engine.step()
        step += 1
        if step in preempt_at:
            engine.preempt_all()
        for request in engine.scheduler.running:
            rule = engine.manager._named[request.request_id]
            # What a request began with it keeps.
            assert rules.setdefault(request.request_id, rule) == rule
    found = [engine.replies.pop(name) for name in names]
    return found, [rules[name] for name in names]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 64},
        {"enable_prefix_caching": True},
    ],
    ids=["plain", "short chunks", "shared prefixes"],
)
def test_requests_of_a_range_answer_as_under_their_own_budget(
    servers: Servers, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    engine = servers.start(kv_cache_memory_bytes=4 * MIB, **options)
    asked = random.Random(5).sample(prompts * 2, 2 * len(prompts))
    found, rules = ask(engine, asked)
    assert len(set(rules)) > 1
    assert not any(engine.pages_held.values())
    assert_same(found, expected_of(servers, asked, rules))


def test_preempted_requests_come_back_to_their_budget(
    servers: Servers, prompts: list[list[int]]
) -> None:
    engine = servers.start(kv_cache_memory_bytes=4 * MIB)
    found, rules = ask(engine, prompts, preempt_at=(3, 9, 17))
    assert sum(reply.preemptions for reply in found) > 3
    assert_same(found, expected_of(servers, prompts, rules))


def test_who_is_alone_gets_the_largest_budget(
    servers: Servers, prompts: list[list[int]]
) -> None:
    engine = servers.start()
    for prompt in prompts[-3:]:
        _, rules = ask(engine, [prompt])
        assert rules == [engine.manager.rule.levels[0]]
