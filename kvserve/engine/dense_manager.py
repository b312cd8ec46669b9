# SPDX-License-Identifier: Apache-2.0
"""Allocates pages for dense prefills in vLLM's scheduler, by the dense plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvserve.dense_plan import DensePlan
from kvserve.engine.manager import HeadPagedManager
from kvserve.engine.spec import DensePagedSpec


class DensePagedManager(HeadPagedManager):
    """Gives a request a full cache while it reads its prompt, then what its lanes keep.

    The scheduler tells prompt lengths by :meth:`expect`. Invariant: the page list of a
    request has ``plan.entries(n)`` entries, and those that were freed are null.
    """

    def __init__(
        self, kv_cache_spec: DensePagedSpec, block_pool: BlockPool, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._rule = kv_cache_spec.rule
        self._prompt_tokens: dict[str, int] = {}

    def expect(self, request_id: str, prompt_tokens: int) -> None:
        """Note a request's prompt; it may be preempted and come back many times."""
        self._prompt_tokens[request_id] = prompt_tokens

    def forget(self, request_id: str) -> None:
        """Drop a request that will not come back."""
        self._prompt_tokens.pop(request_id, None)

    def plan_of(self, request_id: str) -> DensePlan:
        return self._rule.plan(self._prompt_tokens[request_id])

    def _entries(self, request_id: str, num_tokens: int) -> int:
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
            # May the request enter? Only if its whole prompt fits beside what the
            # prompts being read are still to take: two that cannot both be held run
            # one after the other instead of evicting each other.
            needed = self.plan_of(request_id).most_pages(num_tokens)
            return needed + self._owed_to_others(request_id)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
        )

    def _owed_to_others(self, request_id: str) -> int:
        return sum(
            max(self.plan_of(other).prompt_entries - len(held), 0)
            for other, held in self.req_to_blocks.items()
            if other != request_id
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what did not survive, before anything else is allocated."""
        plan = self.plan_of(request_id)
        if processed_computed_tokens >= plan.prompt_tokens and not plan.is_whole:
            self._remove_blocks_in_range(
                request_id, plan.kept_entries, plan.prompt_entries
            )
