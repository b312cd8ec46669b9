# SPDX-License-Identifier: Apache-2.0
"""Allocates pages for dense prefills in vLLM's scheduler, by the dense plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.plan.dense import DensePlan


class DensePagedManager(HeadPagedManager):
    """Gives a request a full cache while it reads its prompt, then what its lanes keep.

    Invariant: the page list of a request has ``plan.entries(n)`` entries, and those
    that were freed are null.
    """

    def plan_of(self, request_id: str) -> DensePlan:
        return cast(DensePlan, self._plans[request_id])

    def pages_held(self, request_id: str) -> int:
        held = self.req_to_blocks.get(request_id, ())
        plan = self.plan_of(request_id)
        freed = range(plan.kept_entries, plan.prompt_entries)
        # They are freed all at once, so one of them tells of all.
        if freed and len(held) > freed.start and held[freed.start].is_null:
            return len(held) - len(freed)
        return len(held)

    def reads_prompt(self, request_id: str, tokens: int) -> bool:
        """Tell whether a request of ``tokens`` tokens holds a full cache for now."""
        plan = self.plan_of(request_id)
        return tokens <= plan.prompt_tokens and not plan.is_whole

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
