# SPDX-License-Identifier: Apache-2.0
"""Requests that share pages, against a pool of labels instead of keys.

vLLM's own block pool and cache manager allocate, the worker's tables and rows say what
is read and written; only the model is missing. A label names a token by all the text
before it, so a query that is given another text's page, or a stale one, is caught.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import cast

import numpy as np
from hypothesis import given, settings
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request, RequestStatus

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.batch.rows import RowBuilder
from kvserve.engine.scheduling.shared_manager import SharedPagedManager
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import StreamRule
from tests.engine.pool_audit import PoolAudit
from tests.unit.engine.scheduling.books import cache_of
from tests.unit.pool_model import Label, PoolModel
from tests.unit.simulator import (
    Batch,
    make_plan,
    page_lists_of,
    plans,
    ranked_plans,
    refresh,
    seeds,
    thinned_plans,
)
from tests.unit.simulator import Request as Row

MAX_REQUESTS, MAX_TOKENS = 4, 40
FULL = (0, 0)


@dataclass(frozen=True)
class OnePlan:
    """A rule that gives every request the same plan."""

    plan: PagePlan
    in_flight: int
    is_elastic: bool = False
    copies: int = 1
    policy: None = None
    is_shared: bool = True
    max_tokens: int = MAX_TOKENS

    @property
    def page_size(self) -> int:
        return self.plan.page_size

    @property
    def largest(self) -> PagePlan:
        return self.plan

    @property
    def full(self) -> PagePlan:
        return self.plan.full

    def most_pages(self, tokens: int) -> int:
        return self.plan.most_pages(tokens, self.in_flight)

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> PagePlan:
        return self.plan


@dataclass(eq=False)
class SharingRow(Row):
    """What the worker knows of a request; labels follow from its text alone."""

    text: list[int] = field(default_factory=list)


class TextPool(PoolModel):
    """A pool whose labels name the text up to a token."""

    def _label(self, request: Row, layer: int, head: int, position: int) -> Label:
        text = cast(SharingRow, request).text[: position + 1]
        return Label(",".join(map(str, text)), 0, layer, head, position)


class Worker:
    """One rank's half of each step, every read and write of it checked."""

    def __init__(self, plan: PagePlan, rank: int) -> None:
        self.plan = plan.by_rank[rank]
        self.tables = PageTables(plan, MAX_REQUESTS, MAX_TOKENS, rank=rank)
        self.rows = RowBuilder(self.plan, self.tables)
        self.pool = TextPool(self.plan, 0)

    def step(self, batch: Batch) -> set[int]:
        """Run a batch; return the pages that it wrote to."""
        for row in batch.requests:
            row.plan = self.plan
        self.tables.forget(batch.restarted)
        refresh(self.tables, batch)
        step = self.rows.build(batch.query_start, batch.seq_lens)
        self.pool.run(batch, step, self.tables.leaving)
        slots = [
            step.slots.ravel(),
            *(t for one in self.tables.leaving for t in one.targets),
        ]
        return {slot // self.plan.page_size for slot in np.concatenate(slots).tolist()}


class Server:
    """A scheduler over vLLM's cache manager, and a worker for each rank."""

    def __init__(
        self, plan: PagePlan, rng: Random, spare: int = 0, token_budget: int = 24
    ) -> None:
        self.plan, self.rng, self.token_budget = plan, rng, token_budget
        rule = OnePlan(plan, token_budget)
        num_pages = 1 + rule.most_pages(MAX_TOKENS) + spare
        self.manager, pages = cache_of(cast(StreamRule, rule), num_pages, scratch=0)
        self.pages = cast(SharedPagedManager, pages)
        self.requests: dict[str, Request] = {}
        self.audit = PoolAudit(self.pages, self.requests)
        self.workers = [Worker(plan, rank) for rank in range(plan.ranks)]
        self._hasher = get_request_block_hasher(plan.page_size, sha256)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.texts: dict[str, list[int]] = {}
        self.final: dict[str, int] = {}
        self.hits: dict[str, int] = {}
        self.prefilled = 0
        self.preemptions = 0

    def add(self, prompt: list[int], reply: int, salt: str | None = None) -> Request:
        request = Request(
            f"request-{len(self.texts)}",
            list(prompt),
            SamplingParams(max_tokens=reply),
            None,
            cache_salt=salt,
            block_hasher=self._hasher,
        )
        self.texts[request.request_id] = list(prompt)
        self.final[request.request_id] = len(prompt) + reply
        self.waiting.append(request)
        self.requests[request.request_id] = request
        return request

    def step(self) -> None:
        """Schedule, run and settle one step; check every read, write and book."""
        self.audit.begin_step()
        self.manager.new_step_starts()
        lengths, started = self._schedule()
        if not lengths:
            self.audit.end_step(set())
            return
        batch = self._batch(lengths, started)
        written = [worker.step(batch) for worker in self.workers]
        self.audit.end_step(set().union(*written))
        self._settle(lengths)
        self.audit.check_books()

    def finish(self) -> None:
        while self.waiting or self.running:
            self.step()

    def abort(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_ABORTED
        (self.running if request in self.running else self.waiting).remove(request)
        self._free(request)

    def _schedule(self) -> tuple[dict[str, int], list[str]]:
        lengths: dict[str, int] = {}
        started: list[str] = []
        budget, preempted = self.token_budget, False
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            length = self._length(request, request.num_computed_tokens, budget)
            while self.manager.allocate_slots(request, length) is None:
                victim = self._victim(lengths)
                preempted = True
                budget += lengths.pop(victim.request_id, 0)
                self._preempt(victim)
                if victim is request:
                    break
            if request in self.running:
                lengths[request.request_id] = length
                budget -= length
        while self.waiting and budget and not preempted:
            if len(self.running) == MAX_REQUESTS:
                break
            request = self.waiting[0]
            length = self._start(request, budget)
            if not length:
                break
            lengths[request.request_id] = length
            started.append(request.request_id)
            budget -= length
        return lengths, started

    def _start(self, request: Request, budget: int) -> int:
        """Admit a request with the cached part of its text; give its first chunk."""
        cached, num_cached, _ = self.manager.get_computed_blocks(request)
        assert num_cached < request.num_tokens
        assert num_cached % self.plan.page_size == 0
        length = self._length(request, num_cached, budget)
        blocks = self.manager.allocate_slots(
            request, length, num_cached, cached, full_sequence_must_fit=True
        )
        if blocks is None:
            assert self.running, "the longest request fits into an empty pool"
            return 0
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached
        self.hits.setdefault(request.request_id, num_cached)
        return length

    def _length(self, request: Request, computed: int, budget: int) -> int:
        most = min(request.num_tokens - computed, budget)
        kind = self.rng.random()
        if kind < 0.1:
            return 1
        return most if kind < 0.7 else self.rng.randint(1, most)

    def _victim(self, lengths: dict[str, int]) -> Request:
        """Whom vLLM preempts: the last, or under priorities anybody.

        Even a request whose part of this very step is planned.
        """
        planned = [r for r in self.running if r.request_id in lengths]
        if planned and self.rng.random() < 0.4:
            return self.rng.choice(planned)
        return (
            self.running[-1]
            if self.rng.random() < 0.7
            else self.rng.choice(self.running)
        )

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pages.uncache(request, request.num_computed_tokens)
        self.manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)
        self.preemptions += 1

    def _batch(self, lengths: dict[str, int], started: list[str]) -> Batch:
        rows = []
        for request in self.running:
            name = request.request_id
            if name not in lengths:
                continue
            row = SharingRow(name, self.plan, 0, 0, 0, request.num_computed_tokens)
            row.pages = [page.block_id for page in self.pages.req_to_blocks[name]]
            row.text = self.texts[name]
            rows.append(row)
        rows.sort(key=lambda row: 0 if lengths[row.name] == 1 and row.computed else 1)
        lists = page_lists_of(cast(list[Row], rows), MAX_REQUESTS, MAX_TOKENS)
        sizes = [lengths[row.name] for row in rows]
        return Batch(cast(list[Row], rows), sizes, started, lists)

    def _settle(self, lengths: dict[str, int]) -> None:
        for request in list(self.running):
            name = request.request_id
            request.num_computed_tokens += lengths.get(name, 0)
            self.prefilled += lengths.get(name, 0)
            if name not in lengths or request.num_computed_tokens < request.num_tokens:
                continue
            # Two texts that are equal so far may part here.
            token = self.rng.randrange(2)
            request.append_output_token_ids(token)
            self.texts[name].append(token)
            if request.num_tokens >= self.final[name]:
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
                self.running.remove(request)
                self._free(request)

    def _free(self, request: Request) -> None:
        self.manager.free(request)
        del self.requests[request.request_id]


def random_texts(rng: Random) -> Iterator[list[int]]:
    """Prompts that begin alike: cut anywhere out of few texts, then going on freely."""
    stems = [[rng.randrange(3) for _ in range(MAX_TOKENS)] for _ in range(2)]
    while True:
        stem = rng.choice(stems)
        prompt = stem[: rng.randint(1, MAX_TOKENS - 2)]
        if rng.random() < 0.4:
            extra = rng.randint(1, MAX_TOKENS - 1 - len(prompt))
            prompt = prompt + [rng.randrange(2) for _ in range(extra)]
        yield prompt


def check_load(plan: PagePlan, rng: Random, requests: int = 10) -> Server:
    size, chunk = plan.page_size, rng.choice([3, 8, 24])
    server = Server(plan, rng, rng.choice([0, 0, 5, 60]), max(chunk, size))
    texts = random_texts(rng)
    for _ in range(requests):
        prompt = next(texts)
        if server.texts and rng.random() < 0.3:
            # A chat's next turn: all that was said, and more.
            said = rng.choice(list(server.texts.values()))
            prompt = [*said[: MAX_TOKENS - 3], 2]
        server.add(prompt, rng.randint(1, MAX_TOKENS - len(prompt)))
        for _ in range(rng.randint(0, 4)):
            server.step()
        if server.running and rng.random() < 0.15:
            server.abort(rng.choice(server.running))
        if rng.random() < 0.03:
            server.manager.reset_prefix_cache()
    server.finish()
    assert server.manager.usage == 0
    return server


@settings(max_examples=100, deadline=None)
@given(plans(max_layers=2), seeds())
def test_every_query_of_any_load_reads_its_own_text(
    plan: PagePlan, rng: Random
) -> None:
    check_load(replace(plan, is_shared=True), rng)


@settings(max_examples=60, deadline=None)
@given(thinned_plans(max_layers=2), seeds())
def test_packed_history_is_shared_like_everything_else(
    plan: PagePlan, rng: Random
) -> None:
    check_load(replace(plan, is_shared=True), rng)


@settings(max_examples=25, deadline=None)
@given(ranked_plans(), seeds())
def test_ranks_with_other_lanes_share_one_page_list(
    plan: PagePlan, rng: Random
) -> None:
    check_load(replace(plan, is_shared=True), rng, requests=8)


MIXED = replace(make_plan(4, [[FULL, (1, 2)], [(1, 2), (1, 2)]]), is_shared=True)


def ask(server: Server, text: list[int], salt: str | None = None) -> int:
    """Run one request alone; return the tokens that it found in the cache."""
    request = server.add(text, 2, salt)
    server.finish()
    return server.hits[request.request_id]


def test_a_long_prompt_leaves_cached_conversations_alone() -> None:
    """It goes through more pages than are free, and gives most of them back."""
    said, other = [0] * 20, [1] * 38
    spare = MIXED.pages(len(said) + 2)
    server = Server(MIXED, Random(1), spare, token_budget=4)
    ask(server, said)
    assert MIXED.entries(len(other)) > server.manager.block_pool.num_gpu_blocks - spare
    ask(server, other)
    assert ask(server, [*said, 2, 2]) == len(said)


def test_where_texts_part_twice_the_third_may_start() -> None:
    """However many pages others went through in between."""
    system, spare = [0] * 24, MIXED.pages(40) + MIXED.num_lanes
    server = Server(MIXED, Random(2), spare, token_budget=4)
    found = []
    for number in range(4):
        found.append(ask(server, [*system, *[number + 3] * 14]))
        ask(server, [number + 10] * 38)
    assert found[0] == 0
    assert found[2:] == [len(system)] * 2


def test_requests_of_unequal_salts_share_nothing() -> None:
    server, text = Server(MIXED, Random(3), spare=100), [0] * 30
    assert [ask(server, text, salt) for salt in ("a", "b", None)] == [0, 0, 0]
    assert [ask(server, text, salt) for salt in ("a", "b", None)] == [28, 28, 28]
