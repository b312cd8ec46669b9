# SPDX-License-Identifier: Apache-2.0
"""Which budget of a range a request gets: the largest with which all that wait fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request

from kvserve.engine.scheduling.budget_range import BudgetRange
from kvserve.engine.scheduling.usage import WorkerUsage, cache_usage
from kvserve.extra_args import LEVEL, POLICY, PROTECT, said_in
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import level_of, rule_of_request
from policies.sink_recent import SinkRecent
from tests.unit.engine.scheduling.books import CHUNK, RING, SHARED, cache_of
from tests.unit.simulator import seeds

RECENT = (448, 288, 192, 64)
LEAST = len(RECENT) - 1
LEVELS = tuple(replace(RING, policy=SinkRecent(recent=tokens)) for tokens in RECENT)
RULE = MixedRule(LEVELS[-1], CHUNK, mixed=False, levels=LEVELS)
SHARING = tuple(replace(SHARED, policy=level.policy) for level in LEVELS)
RULES = {
    "alone": RULE,
    "sharing": replace(RULE, default=SHARING[-1], levels=SHARING),
}


class Queue:
    """Requests that wait and run, as a scheduler has them.

    Args:
        pages: that requests can have.
    """

    def __init__(self, rule: MixedRule, pages: int, most_requests: int = 16) -> None:
        self.rule, self.pages = rule, pages
        self.cache, self.manager = cache_of(rule, pages + 1, 0)
        self.range = BudgetRange(rule, self.manager, most_requests)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._names = itertools.count()

    def add(self, prompt: int, reply: int, params: Any = None) -> Request:
        params = params or SamplingParams(max_tokens=reply)
        name = f"request-{next(self._names)}"
        request = Request(name, [1] * prompt, params, None)
        self.waiting.append(request)
        self._expect(request)
        return request

    def share(self) -> None:
        """What comes before a step."""
        for request in self.range.share_out(self.waiting, self.running):
            self._expect(request)

    def begin(self, request: Request) -> None:
        """Let a request in; its first chunk of tokens is computed."""
        if request.num_preemptions == 0:
            self.range.note_begun([NewRequestData.from_request(request, ())])
        length = min(request.num_prompt_tokens, CHUNK)
        assert self.cache.allocate_slots(request, length) is not None
        request.num_computed_tokens = length
        self.waiting.remove(request)
        self.running.append(request)

    def preempt(self, request: Request) -> None:
        self.cache.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.running.remove(request)
        self.waiting.insert(0, request)

    def end(self, request: Request) -> None:
        self.cache.free(request)
        self.manager.forget(request.request_id)
        self.range.forget(request.request_id)
        self.running.remove(request)

    def level(self, request: Request) -> int:
        return level_of(self.rule, request.sampling_params)

    def _expect(self, request: Request) -> None:
        lengths = request.num_prompt_tokens, request.max_tokens
        own = rule_of_request(self.rule, request.sampling_params, sum(lengths))
        self.manager.expect(request.request_id, *lengths, own)


def pages_of(rule: MixedRule, level: int, tokens: int) -> int:
    """Pages with which one that reads in whole steps gets to its end."""
    return rule.levels[level].plan(tokens).most_pages(tokens, rule.in_flight)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_one_alone_gets_the_largest_for_which_there_is_room(
    kind: str, level: int
) -> None:
    rule = RULES[kind]
    needed = pages_of(rule, level, 900)
    for pages, expected in ((needed, level), (needed - 1, min(level + 1, LEAST))):
        queue = Queue(rule, pages)
        request = queue.add(800, 100)
        queue.share()
        assert queue.level(request) == expected


@pytest.mark.parametrize("kind", RULES)
@settings(max_examples=50)
@given(seeds())
def test_what_all_get_is_the_largest_that_all_can_have(kind: str, rng: Random) -> None:
    rule = RULES[kind]
    queue = Queue(rule, rng.randint(10, 150))
    for _ in range(rng.randint(1, 6)):
        queue.add(rng.randint(1, 800), rng.randint(1, 200))
    queue.share()
    (chosen,) = {queue.level(request) for request in queue.waiting}
    lengths = [one.num_prompt_tokens + one.max_tokens for one in queue.waiting]

    def fit(level: int) -> bool:
        held = [rule.levels[level].plan(n).most_pages(n) for n in lengths]
        reading = [pages_of(rule, level, n) for n in lengths]
        beside = max(r - h for r, h in zip(reading, held, strict=True))
        return sum(held) + beside <= queue.pages

    best = next((n for n in range(LEAST) if fit(n)), LEAST)
    assert chosen == best


def test_all_get_the_least_if_not_even_that_lets_all_in() -> None:
    queue = Queue(RULE, pages_of(RULE, LEAST, 900) + 1)
    for _ in range(3):
        queue.add(800, 100)
    queue.share()
    assert {queue.level(request) for request in queue.waiting} == {LEAST}


def test_only_those_count_that_could_run_at_once() -> None:
    queue = Queue(RULE, 2 * pages_of(RULE, 0, 900), most_requests=2)
    requests = [queue.add(800, 100) for _ in range(5)]
    queue.share()
    assert [queue.level(request) for request in requests] == [0, 0, *3 * [LEAST]]
    assert said_in(requests[2].sampling_params, LEVEL) is None


def one_that_runs_and_three_that_wait() -> tuple[Queue, Request, list[Request]]:
    """Of equal requests, in a pool that holds two of the largest budget."""
    queue = Queue(RULE, 2 * pages_of(RULE, 0, 900))
    first = queue.add(800, 100)
    queue.share()
    queue.begin(first)
    others = [queue.add(800, 100) for _ in range(3)]
    queue.share()
    return queue, first, others


def test_what_waits_follows_the_load_and_what_has_begun_never_does() -> None:
    queue, first, others = one_that_runs_and_three_that_wait()
    plan = queue.manager.plan_of(first.request_id)
    assert queue.level(first) == 0
    lowered = queue.level(others[0])
    assert lowered > 0
    assert {queue.level(request) for request in others} == {lowered}
    queue.waiting = others[:1]
    queue.share()
    assert queue.level(others[0]) == 0
    assert queue.level(first) == 0
    assert queue.manager.plan_of(first.request_id) is plan


@settings(max_examples=30)
@given(seeds())
def test_one_that_was_preempted_comes_back_to_its_budget(rng: Random) -> None:
    queue = Queue(RULE, 90)
    begun: dict[str, int] = {}
    for _ in range(30):
        if len(queue.waiting) < 3:
            queue.add(rng.randint(1, 800), rng.randint(1, 200))
        queue.share()
        what = rng.random()
        if queue.running and what < 0.3:
            queue.preempt(rng.choice(queue.running))
        elif queue.running and what < 0.5:
            queue.end(rng.choice(queue.running))
        elif queue.cache.block_pool.get_num_free_blocks() > 20:
            queue.begin(queue.waiting[0])
            begun.setdefault(
                queue.running[-1].request_id, queue.level(queue.running[-1])
            )
        for request in [*queue.running, *queue.waiting]:
            if request.request_id in begun:
                assert queue.level(request) == begun[request.request_id]
                plan = queue.manager.plan_of(request.request_id)
                level = begun[request.request_id]
                tokens = request.num_prompt_tokens + request.max_tokens
                assert plan == RULE.levels[level].plan(tokens)


def test_parameters_that_samples_share_stay_as_they_are() -> None:
    params = SamplingParams(max_tokens=100, extra_args={"session": "a"})
    queue = Queue(RULE, 3 * pages_of(RULE, 0, 900), most_requests=2)
    first, second, third = (queue.add(800, 100, params) for _ in range(3))
    queue.share()
    assert params.extra_args == {"session": "a"}
    for request in (first, second):
        assert said_in(request.sampling_params, "session") == "a"
        assert said_in(request.sampling_params, LEVEL) == 0
    assert third.sampling_params is params


@pytest.mark.parametrize("written", [0, -1, 99, 1.0, "0", None])
def test_no_client_chooses_its_budget(written: Any) -> None:
    params = SamplingParams(max_tokens=100, extra_args={LEVEL: written})
    queue = Queue(RULE, pages_of(RULE, 2, 900))
    request = queue.add(800, 100, params)
    queue.share()
    assert queue.level(request) == 2


def test_who_names_a_policy_has_it_and_takes_its_room() -> None:
    rule = replace(RULE, mixed=True)
    full = rule.full.most_pages(900)
    queue = Queue(rule, full + pages_of(rule, 1, 900))
    params = SamplingParams(max_tokens=100, extra_args={POLICY: "full"})
    named, other = queue.add(800, 100, params), queue.add(800, 100)
    queue.share()
    assert named.sampling_params is params
    assert queue.level(other) == 1
    for request in (named, other):
        queue.begin(request)
    assert queue.manager.ledger.given == {1: 1}


def test_the_books_count_requests_by_their_budget_once() -> None:
    queue, first, others = one_that_runs_and_three_that_wait()
    lowered = queue.level(others[0])
    queue.begin(others[0])
    queue.preempt(first)
    queue.share()
    queue.begin(first)
    queue.end(others[0])
    used = cache_usage(
        queue.manager,
        {one.request_id: one for one in queue.running},
        [WorkerUsage(0.0, 0.0, {})],
    )
    expected = [{"running": 0, "begun": 0} for _ in LEVELS]
    expected[0] = {"running": 1, "begun": 1}
    expected[lowered] = {"running": 0, "begun": 1}
    assert used["budgets"] == expected


def test_where_there_is_one_budget_none_are_counted() -> None:
    queue = Queue(replace(RULE, levels=()), 90)
    assert (
        cache_usage(queue.manager, {}, [WorkerUsage(0.0, 0.0, {})])["budgets"] is None
    )


def test_what_a_request_has_protected_counts() -> None:
    queue = Queue(replace(RULE, protects=True), pages_of(RULE, 0, 900))
    params = SamplingParams(max_tokens=100, extra_args={PROTECT: "0-700"})
    free, protecting = queue.add(800, 100), queue.add(800, 100, params)
    queue.waiting.remove(free)
    queue.share()
    assert queue.level(protecting) > 0
    queue.waiting = [free]
    queue.share()
    assert queue.level(free) == 0
