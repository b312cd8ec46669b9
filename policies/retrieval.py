# SPDX-License-Identifier: Apache-2.0
"""Retrieval heads keep everything, all other heads sinks plus a recent window.

Sources: the scores are those of Retrieval Head (arXiv 2404.15574, section 2), the
split of heads into full and streaming ones is DuoAttention's (arXiv 2410.10819).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from policies.base import (
    FULL,
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)
from policies.head_scores import load_head_scores, scores_path, top_heads


@dataclass(frozen=True)
class Retrieval(StreamingPolicy):
    """The KV heads with the highest retrieval scores keep every token."""

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = (
        "Retrieval Head, arXiv 2404.15574; DuoAttention, arXiv 2410.10819"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        needs_profile=True,
        prefix_cacheable=True,
        cuda_graph_safe=True,
        tensor_parallel_exact=True,
    )

    profile: str | None = parameter(
        None,
        "file of head scores: kvserve JSON, Retrieval_Head JSON or DuoAttention TSV; "
        "without it, the profile that ships for the model, else the one that is "
        "measured when an engine first starts with it, and kept",
    )
    full_ratio: float = parameter(
        0.2, "share of KV heads that keep everything", minimum=0.0, maximum=1.0
    )
    sinks: int = parameter(
        32, "first tokens that the other heads keep, in whole pages", minimum=1
    )
    recent: int = parameter(
        480, "last tokens that the other heads keep, in whole pages", minimum=1
    )

    def files(self, model_name: str) -> dict[str, Path]:
        return {"profile": scores_path(self.profile, model_name)}

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        scores = load_head_scores(self.profile, model)
        full = top_heads(scores, self.full_ratio)
        window = HeadBudget(self.sinks, self.recent)
        return tuple(
            tuple(
                FULL if (layer, head) in full else window
                for head in range(model.num_kv_heads)
            )
            for layer in range(model.num_layers)
        )
