# SPDX-License-Identifier: Apache-2.0
"""What the prompt's last tokens look at, and those last tokens.

Source: SnapKV (arXiv 2404.14469, section 4). One choice per KV head, where the authors'
code chooses per query head and stores a group's keys several times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvserve.errors import UserError
from policies.base import (
    Capabilities,
    DensePolicy,
    Lane,
    ModelShape,
    Prompt,
    Selection,
    parameter,
)
from policies.scoring import choice, observed_attention, odd, pooled, top_positions


@dataclass(frozen=True)
class SnapKV(DensePolicy):
    """Every KV head keeps the window and the tokens that the window attends to."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="dense",
        position_only=False,
        scores_tokens=True,
        tensor_parallel_exact=True,
    )

    capacity: int = parameter(1024, "prompt tokens that a head keeps", minimum=64)
    window: int = parameter(
        32, "last prompt tokens, which observe and stay", minimum=1, maximum=512
    )
    kernel: int = parameter(5, "width of pooling, odd", minimum=1)
    pooling: str = parameter("avg", "how neighbours' scores are pooled: avg or max")
    gqa_agg: str = parameter("mean", "query heads of a group: mean, sum or max")
    bounded_tail: bool = parameter(
        False,
        "hold no more than `capacity`: generated tokens replace the last `recent`",
    )
    recent: int = parameter(
        256,
        "last tokens that stay under `bounded_tail`, at most half of `capacity`",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        odd(self.name, "kernel", self.kernel)
        choice(self.name, "pooling", self.pooling, "avg", "max")
        choice(self.name, "gqa_agg", self.gqa_agg, "mean", "sum", "max")
        if self.window >= self.capacity:
            raise UserError(
                f"--policy-arg window={self.window}: must be less than "
                f"capacity={self.capacity} (policy {self.name})"
            )

    @property
    def observation_window(self) -> int:
        return self.window

    def lanes(self, model: ModelShape, tokens: int) -> tuple[tuple[Lane, ...], ...]:
        lane = Lane(min(tokens, self.capacity))
        if self.bounded_tail:
            lane = Lane(lane.keep, "ring", self._ring, self.capacity)
        return ((lane,) * model.num_kv_heads,) * model.num_layers

    @property
    def _ring(self) -> int:
        """Last tokens of a reply that is bounded."""
        return min(self.recent, self.capacity // 2)

    def select(
        self, model: ModelShape, layer: int, prompt: Prompt, lanes: tuple[Lane, ...]
    ) -> Selection:
        tokens, heads = prompt.num_tokens, list(range(len(lanes)))
        if lanes[0].keep == tokens:
            everything = torch.arange(tokens, device=prompt.keys.device)
            return Selection(heads, [everything] * len(heads))
        last = max(self.window, self._ring) if self.bounded_tail else self.window
        scores = observed_attention(prompt, self.gqa_agg).sum(dim=1)
        scores = pooled(scores[:, : tokens - self.window], self.kernel, self.pooling)
        window = torch.arange(tokens - last, tokens, device=scores.device)
        positions = [
            torch.cat([top_positions(score[: tokens - last], lane.keep - last), window])
            for score, lane in zip(scores, lanes, strict=True)
        ]
        return Selection(heads, positions)
