# SPDX-License-Identifier: Apache-2.0
"""Attention sinks plus a recent window, for every head alike.

Source: StreamingLLM (arXiv 2309.17453), with keys at their original positions: the
paper's re-numbering of positions inside the cache is left out, so the window is valid
within the model's trained length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.base import (
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)


@dataclass(frozen=True)
class SinkRecent(StreamingPolicy):
    """Every KV head keeps the first ``sinks`` and the last ``recent`` tokens."""

    name: ClassVar[str] = "sink-recent"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        prefix_cacheable=True,
        cuda_graph_safe=True,
        tensor_parallel_exact=True,
    )

    sinks: int = parameter(
        32, "first tokens that are never evicted, in whole pages", minimum=1
    )
    recent: int = parameter(
        992, "last tokens kept, in whole pages, the open page counted", minimum=1
    )

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        head = HeadBudget(self.sinks, self.recent)
        return ((head,) * model.num_kv_heads,) * model.num_layers
