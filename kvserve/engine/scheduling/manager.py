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
from kvserve.plan.lanes import IntArray
from kvserve.plan.ledger import Ledger
from kvserve.plan.protection import spans_in_words
from kvserve.plan.rule import RequestPlan, Rule
from policies.base import Policy


class HeadPagedManager(SingleTypeKVCacheManager):
    """Gives a request exactly the pages of its plan.

    Invariant: the page list of a request has ``plan.entries(m)`` entries, ``m`` the
    most tokens seen so far, refused ones included, and those are null that the plan has
    given back.

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
        self._plans: dict[str, RequestPlan] = {}
        self._named: dict[str, Rule] = {}
        self._held: dict[str, int] = {}
        # Tokens that each page list was made for: refused ones leave it as it is.
        self._listed: dict[str, int] = {}
        # Tokens that were computed when pages were last given back.
        self._computed: dict[str, int] = {}
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
        named: Rule | None = None,
    ) -> None:
        """Note a new request; it may be preempted and come back many times.

        Args:
            named: the request's own rule, if it has one.
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
        return self._rule_of(request_id).policy

    def _rule_of(self, request_id: str) -> Rule:
        return self._named.get(request_id, self.rule)

    def plan_of(self, request_id: str) -> RequestPlan:
        """Return the page plan of a request."""
        return self._plans[request_id] if self.rule.is_elastic else self._plan

    def pages_held(self, request_id: str) -> int:
        """Count the pages of a request."""
        return self._held.get(request_id, 0)

    def listed(self, request_id: str) -> int:
        """Count the tokens for which a request has been given pages."""
        return self._listed.get(request_id, 0)

    def accept(self, request_id: str, num_tokens: int) -> None:
        """Note how many tokens a request really has, some guesses being refused.

        Pages stay where they are: the next tokens go there.
        """
        if request_id in self.ledger.tokens:
            self.ledger.tokens[request_id] = num_tokens

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
        if apply_admission_cap:
            return self._needed_to_enter(request_id, num_tokens, new_computed_blocks)
        held = self.req_to_blocks.get(request_id, new_computed_blocks)
        missing = max(self._entries(request_id, num_tokens) - len(held), 0)
        if not new_computed_blocks:
            return missing
        # Pages of the prefix that nobody holds leave the free pages too.
        revived: int = self._get_num_evictable_blocks(new_computed_blocks)
        return missing + revived

    def _needed_to_enter(
        self, request_id: str, num_tokens: int, cached: Sequence[KVCacheBlock]
    ) -> int:
        """Pages that must be free for a request to begin.

        All its prompt must fit, steps under way and all, beside what others that are
        being read are still to take: two that cannot both be held run one after the
        other instead of evicting each other. Pages that others hold anyway cost it
        nothing.
        """
        in_flight = self.rule.in_flight
        needed = self.plan_of(request_id).most_pages(num_tokens, in_flight)
        owed = sum(
            self.plan_of(other).owed(len(held))
            for other, held in self.req_to_blocks.items()
            if other != request_id
        )
        return needed + owed - sum(p.ref_cnt > 0 for p in cached if not p.is_null)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self.ledger.tokens[request_id] = num_tokens
        self._listed[request_id] = max(num_tokens, self.listed(request_id))
        held = self.req_to_blocks[request_id]
        missing = self._entries(request_id, num_tokens) - len(held)
        if missing <= 0:
            return []
        pages = self.block_pool.get_new_blocks(missing)
        held.extend(pages)
        self._held[request_id] = self.pages_held(request_id) + missing
        self.ledger.grown(request_id, self.pages_held(request_id))
        return pages

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what no later query needs, before anything else is allocated."""
        held = self.req_to_blocks.get(request_id)
        before = self._computed.get(request_id, 0)
        if not held or processed_computed_tokens <= before:
            return
        self._computed[request_id] = processed_computed_tokens
        plan = self.plan_of(request_id)
        entries = plan.given_back(before, processed_computed_tokens)
        if not len(entries):
            return
        self._give_back(request_id, entries, num_prompt_tokens or 0)
        for entry in entries.tolist():
            held[entry] = self._null_block
        self._held[request_id] -= len(entries)

    def _give_back(
        self, request_id: str, entries: IntArray, num_prompt_tokens: int
    ) -> None:
        """Give pages of a request back to the pool."""
        held = self.req_to_blocks[request_id]
        self.block_pool.free_blocks([held[entry] for entry in entries.tolist()])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if request_id in self.req_to_blocks:
            pages = self.pages_held(request_id)
            plan, rule = self.plan_of(request_id), self._rule_of(request_id)
            spans = spans_in_words(rule)
            self.ledger.close(request_id, plan, pages, rule.policy, spans)
        self._held.pop(request_id, None)
        self._listed.pop(request_id, None)
        self._computed.pop(request_id, None)
        listed = super().pop_blocks_for_free(request_id)
        return [page for page in listed if not page.is_null]

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
