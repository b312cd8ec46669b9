# SPDX-License-Identifier: Apache-2.0
"""Allocates head pages in vLLM's scheduler, by the page plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from kvserve.engine.scheduling.prefix_index import PrefixIndex
from kvserve.engine.spec import HeadPagedSpec
from kvserve.plan.dense import DensePlan
from kvserve.plan.ledger import Ledger
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import StreamRule
from policies.base import Policy


class HeadPagedManager(SingleTypeKVCacheManager):
    """Gives a request exactly the pages of its plan.

    Invariant: after ``allocate_new_blocks(request, n)`` the request holds
    ``max(plan.pages(m) for m <= n seen so far)`` pages, in the plan's list order. A
    bounded lane recycles its own pages in place, so nothing is freed before the end.

    Where requests have plans of their own, the scheduler tells lengths by
    :meth:`expect`.

    Attributes:
        index: finds cached pages, where requests share them.
        num_scratch_pages: pages behind the null page that no request is given.
    """

    index: PrefixIndex | None = None

    def __init__(
        self, kv_cache_spec: HeadPagedSpec, block_pool: BlockPool, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._plan = kv_cache_spec.plan
        self.rule = kv_cache_spec.rule
        self._plans: dict[str, PagePlan | DensePlan] = {}
        self._named: dict[str, StreamRule] = {}
        self.ledger = Ledger(self.rule.full, self.rule.copies)
        # Scratch pages leave the pool for good. This manager is the pool's first
        # caller, so they are blocks 1..K and the worker knows them without a message.
        # The pool is told that it is smaller: usage counts what requests can have.
        scratch = block_pool.get_new_blocks(kv_cache_spec.num_scratch_pages)
        expected = list(range(1, len(scratch) + 1))
        if [block.block_id for block in scratch] != expected:
            raise RuntimeError("scratch pages must be the first blocks of the pool")
        block_pool.num_gpu_blocks -= len(scratch)
        self.num_scratch_pages = len(scratch)

    def expect(
        self,
        request_id: str,
        prompt_tokens: int,
        reply_tokens: int,
        named: StreamRule | None = None,
    ) -> None:
        """Note a new request; it may be preempted and come back many times.

        Args:
            named: the rule under the policy that it names, if it names one.
        """
        rule = named or self.rule
        self._plans[request_id] = rule.of_request(prompt_tokens, reply_tokens)
        if named is not None:
            self._named[request_id] = named

    def forget(self, request_id: str) -> None:
        """Drop a request that will not come back."""
        self._plans.pop(request_id, None)
        self._named.pop(request_id, None)
        self.ledger.end(request_id)

    def policy_of(self, request_id: str) -> Policy:
        """Return the policy of a request."""
        return self._named.get(request_id, self.rule).policy

    def plan_of(self, request_id: str) -> PagePlan | DensePlan:
        """Return the page plan of a request."""
        return self._plans[request_id] if self.rule.is_elastic else self._plan

    def pages_held(self, request_id: str) -> int:
        """Count the pages of a request."""
        return len(self.req_to_blocks.get(request_id, ()))

    def _entries(self, request_id: str, num_tokens: int) -> int:
        """Length of the page list of a request with ``num_tokens`` tokens."""
        return self.plan_of(request_id).entries(num_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._entries(request_id, num_tokens) - held, 0)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self.ledger.tokens[request_id] = num_tokens
        held = self.req_to_blocks[request_id]
        missing = self._entries(request_id, num_tokens) - len(held)
        if missing <= 0:
            return []
        pages = self.block_pool.get_new_blocks(missing)
        held.extend(pages)
        self.ledger.grown(request_id, self.pages_held(request_id))
        return pages

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if request_id in self.req_to_blocks:
            pages = self.pages_held(request_id)
            policy = self.policy_of(request_id)
            self.ledger.close(request_id, self.plan_of(request_id), pages, policy)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Report no hit: head pages are not shared between requests."""
        return tuple([] for _ in kv_cache_group_ids), 0
