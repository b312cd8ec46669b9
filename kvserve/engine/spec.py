# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec that tells vLLM's scheduler about head pages.

vLLM sees a model with one attention layer of one KV head: a block of the pool is one
head page. The page plan inside the spec says how many of them a request holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from kvserve.plan.page_plan import PagePlan
from kvserve.plan.rule import Rule


@dataclass(frozen=True, kw_only=True)
class HeadPagedSpec(AttentionSpec):
    """One flat pool of head pages, shared by all layers and KV heads.

    ``num_kv_heads`` is 1 by construction: ``page_size_bytes`` is one head page.
    ``plan`` is that to whose tables all requests belong; ``rule`` makes that of each.
    ``dtype`` is that of the pool, and a token's bytes are ``state_content_bytes``.
    """

    plan: PagePlan
    rule: Rule
    num_scratch_pages: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        length = vllm_config.model_config.max_model_len
        pages = self.rule.least_pool(length) + self.num_scratch_pages
        return pages * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.rule.most_entries(max_len)


@dataclass(frozen=True, kw_only=True)
class SharedPagedSpec(HeadPagedSpec):
    """Head pages that requests with a common prefix share.

    Beside what the longest request holds, memory is for the steps under way: their
    blocks stay till they are done.
    """

    @property
    def prefix_cacheable(self) -> bool:
        return True
