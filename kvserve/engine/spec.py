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
    ``plan`` is that of the request that needs most; ``rule`` makes the plan of each.
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
        in_flight = self.rule.in_flight
        largest = self.plan.most_pages(length, in_flight)
        pages = max(self.rule.most_pages(length), largest)
        return (pages + self.num_scratch_pages) * self.page_size_bytes

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
