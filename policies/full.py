# SPDX-License-Identifier: Apache-2.0
"""Keep everything: the reference that every other policy is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.base import FULL, Capabilities, HeadBudget, ModelShape, StreamingPolicy


@dataclass(frozen=True)
class Full(StreamingPolicy):
    """Every KV head keeps every token, as stock vLLM does."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "none: exact attention"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        prefix_cacheable=True,
        cuda_graph_safe=True,
        tensor_parallel_exact=True,
    )

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        return ((FULL,) * model.num_kv_heads,) * model.num_layers
