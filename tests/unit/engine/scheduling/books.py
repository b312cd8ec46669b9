# SPDX-License-Identifier: Apache-2.0
"""vLLM's cache manager over a small pool of head pages, without a model."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import cast

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from kvserve.engine.scheduling.integrity import check_integrity
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.spec import HeadPagedSpec, SharedPagedSpec
from kvserve.plan.dense import DenseRule
from kvserve.plan.mixed import MixedRule
from kvserve.plan.rule import Rule
from kvserve.plan.streaming import StreamRule
from kvserve.plugin import register
from policies.base import ModelShape, Policy
from policies.full import Full
from policies.sink_recent import SinkRecent
from policies.snapkv import SnapKV

PAGE, MAX_TOKENS, CHUNK, SCRATCH = 32, 1024, 96, 5
MODEL = ModelShape("tiny", 1, 2, 2, 8, MAX_TOKENS)
SHAPE = MODEL, PAGE, MAX_TOKENS
RING = StreamRule(SinkRecent(sinks=32, recent=64), *SHAPE)
SHARED = replace(RING, in_flight=CHUNK, is_shared=True)
SELECTING = SnapKV(capacity=64, window=16)

RULES: dict[str, Rule] = {
    "ring": RING,
    "shared": SHARED,
    "dense": DenseRule(SELECTING, *SHAPE),
    "mixed": MixedRule(RING, CHUNK),
    "mixed and shared": MixedRule(SHARED, CHUNK),
    "guessing": replace(RING, in_flight=CHUNK, lookahead=5),
    "guessing and shared": replace(SHARED, lookahead=PAGE + 9),
}
NAMED: dict[str, tuple[Policy | None, ...]] = {
    "mixed": (None, Full(), SELECTING),
    "mixed and shared": (None, Full(), SinkRecent(sinks=64, recent=96)),
}
"""Policies that requests name."""


def cache_of(
    rule: Rule, num_pages: int, scratch: int
) -> tuple[KVCacheManager, HeadPagedManager]:
    """Return vLLM's manager of a cache whose pages a rule keeps, and ours in it.

    Args:
        num_pages: of the pool, the null page and ``scratch`` pages among them.
    """
    register()
    init_none_hash(sha256)
    page_size, max_tokens = rule.page_size, rule.max_tokens
    spec = (SharedPagedSpec if rule.is_shared else HeadPagedSpec)(
        plan=rule.largest,
        rule=rule,
        num_scratch_pages=scratch,
        block_size=page_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
    )
    config = KVCacheConfig(num_pages, [], [KVCacheGroupSpec(["first"], spec)])
    cache = KVCacheManager(config, max_tokens, page_size, page_size, log_stats=False)
    (manager,) = cache.coordinator.single_type_managers
    return cache, cast(HeadPagedManager, manager)


class Books:
    """The scheduler's books of requests, whose steps run one by one.

    Args:
        kind: how pages are kept, of ``RULES``.
        num_pages: of the pool, the null page and scratch among them.
    """

    def __init__(self, kind: str, num_pages: int = 400) -> None:
        self.named = NAMED.get(kind, (None,))
        self.cache, self.manager = cache_of(RULES[kind], num_pages, SCRATCH)
        self.pool = self.cache.block_pool
        self.requests: dict[str, Request] = {}
        self._hasher = get_request_block_hasher(PAGE, sha256)

    def add(
        self, name: str, prompt: list[int], policy: Policy | None = None
    ) -> Request:
        rule = self.manager.rule
        own = rule.under(policy) if policy and isinstance(rule, MixedRule) else None
        request = Request(
            name,
            prompt,
            SamplingParams(max_tokens=MAX_TOKENS - len(prompt)),
            None,
            cache_salt=repr(policy),
            block_hasher=self._hasher,
        )
        self.manager.expect(name, len(prompt), MAX_TOKENS - len(prompt), own)
        self.requests[name] = request
        return request

    def step(
        self, request: Request, most: int = CHUNK, guesses: int = 0, right: int = 0
    ) -> bool:
        """Compute the next tokens of a request; tell whether there were pages.

        A chunk ends with the prompt, as dense prefills need it.

        Args:
            guesses: tokens that are guessed beside, of which the first ``right`` are.
        """
        start, cached, found = request.num_computed_tokens, 0, None
        if start == 0:
            found, cached, _ = self.cache.get_computed_blocks(request)
            start = cached
        length = min(max(request.num_prompt_tokens - start, 1), most)
        new = length + guesses
        if self.cache.allocate_slots(request, new, cached, found) is None:
            return False
        request.num_computed_tokens = start + length + right
        for _ in range(right):
            request.append_output_token_ids(1)
        if guesses:
            self.manager.accept(request.request_id, request.num_computed_tokens)
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(1)
        return True

    def run(self, name: str, prompt_tokens: int, reply_tokens: int = 0) -> Request:
        """Bring a new request to its prompt's end and some tokens of its reply."""
        request = self.add(name, list(range(prompt_tokens)))
        while request.num_computed_tokens < prompt_tokens + reply_tokens:
            assert self.step(request)
        return request

    def preempt(self, request: Request) -> None:
        self.cache.free(request)
        request.num_computed_tokens = 0

    def end(self, request: Request) -> None:
        self.cache.free(request)
        self.manager.forget(request.request_id)
        del self.requests[request.request_id]

    def faults(self) -> list[str]:
        return check_integrity(self.manager, self.requests)


def _guesses(books: Books, request: Request, rng: Random) -> tuple[int, int]:
    """Draw how many tokens to guess, and how many of them are right."""
    rule = books.manager.rule
    most = rule.lookahead if isinstance(rule, StreamRule) else 0
    if request.num_computed_tokens < request.num_prompt_tokens:
        return 0, 0
    guesses = rng.randint(0, min(most, MAX_TOKENS - request.num_tokens - 1))
    return guesses, rng.randint(0, guesses)


def random_load(books: Books, rng: Random, events: int) -> None:
    """Let requests come, grow, lose their pages and end; all is sound in between."""
    for number in range(events):
        if len(books.requests) < 4:
            stem = [rng.randrange(2)] * rng.randint(0, 200)
            tail = [rng.randrange(99) for _ in range(rng.randint(1, 200))]
            policy = rng.choice(books.named)
            books.add(f"request-{number}", stem + tail, policy)
        request = rng.choice(list(books.requests.values()))
        what = rng.random()
        if what < 0.05:
            books.preempt(request)
        elif what < 0.1 or request.num_tokens == MAX_TOKENS:
            books.end(request)
        elif not books.step(
            request, rng.randint(1, CHUNK), *_guesses(books, request, rng)
        ):
            books.preempt(rng.choice(list(books.requests.values())))
        assert books.faults() == []
