# SPDX-License-Identifier: Apache-2.0
"""What the scheduler remembers does not grow with what clients send."""

from __future__ import annotations

import gc
from functools import _lru_cache_wrapper
from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request, RequestStatus

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.scheduling.shared_manager import SharedPagedManager
from kvserve.engine.start.admission import PolicyGuard
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import rule_of_request
from kvserve.plan.streaming import StreamRule
from policies.base import ModelShape
from policies.full import Full
from tests.unit.engine.scheduling.books import cache_of

PAGE, MAX_TOKENS, POOL = 32, 4096, 512
MODEL = ModelShape("tiny", 1, 2, 2, 8, MAX_TOKENS)
EARLY, LATE = 2_000, 20_000
SLACK = 1_000
"""Objects: less than one for every tenth request; 512 receipts are kept."""
OURS = ("kvserve", "policies")
MOST_CACHED = 256


class Server:
    """The scheduler's and the worker's books of requests, without a model."""

    def __init__(self) -> None:
        self.rule = MixedRule(
            StreamRule(Full(), MODEL, PAGE, MAX_TOKENS, in_flight=512, is_shared=True)
        )
        self.guard = PolicyGuard(self.rule, MAX_TOKENS, POOL)
        self.pages, self.manager = cache_of(self.rule, POOL, scratch=0)
        assert isinstance(self.manager, SharedPagedManager)
        self.tables = PageTables(self.rule.largest, 4, MAX_TOKENS, self.rule)
        self._hasher = get_request_block_hasher(PAGE, sha256)

    def serve(self, name: str, policy: str, prompt: list[int], reply: int) -> None:
        """Let one request come, grow to its end and leave."""
        params: Any = SamplingParams(max_tokens=reply, extra_args={"kv_policy": policy})
        self.guard.admit(params, len(prompt))
        request = Request(
            name, prompt, params, None, block_hasher=self._hasher, cache_salt=name
        )
        tokens = len(prompt) + reply
        named = rule_of_request(self.rule, params, tokens)
        self.manager.expect(name, len(prompt), reply, named)
        self.tables.expect(name, len(prompt), reply, named)
        cached, count = self.pages.get_computed_blocks(request)[:2]
        new = self.pages.allocate_slots(request, len(prompt) - count, count, cached)
        assert new is not None
        request.num_computed_tokens = len(prompt)
        request.append_output_token_ids([1] * reply)
        assert self.pages.allocate_slots(request, reply) is not None
        request.status = RequestStatus.FINISHED_STOPPED
        self.pages.free(request)
        self.manager.forget(name)
        self.tables.finish([name])


def policy(number: int) -> str:
    """Numbers that no other request names."""
    return f"sink-recent:sinks={1 + number % 1801},recent={1 + number * 7 % 2003}"


def objects(server: Server) -> int:
    """Count what is alive beside caches, which have bounds."""
    assert server.pages.reset_prefix_cache()
    index = server.manager.index
    assert len(index) <= 1024
    index._most_records = 0
    index._sweep()
    caches = [one for one in gc.get_objects() if type(one) is _lru_cache_wrapper]
    for cache in caches:
        if cache.__module__.startswith(OURS):
            assert cache.cache_info().currsize <= MOST_CACHED
            cache.cache_clear()
    gc.collect()
    return len(gc.get_objects())


def test_memory_is_flat_over_20000_different_requests() -> None:
    server, early = Server(), 0
    for number in range(LATE):
        prompt = [number % 500, number // 500, *range(62)]
        server.serve(f"request {number}", policy(number), prompt, 33)
        if number == EARLY:
            early = objects(server)
    assert objects(server) - early < SLACK
    assert server.pages.block_pool.get_num_free_blocks() == POOL - 1
