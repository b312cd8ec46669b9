"""Keep the tokens of shortest keys: they draw the most attention (arXiv 2406.11430)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from policies.base import (
    Capabilities,
    DensePolicy,
    Lane,
    ModelShape,
    Prompt,
    Selection,
    parameter,
)
from policies.scoring import top_positions


@dataclass(frozen=True)
class KeyNorm(DensePolicy):
    """Every KV head keeps the shortest keys of the prompt, and the last tokens."""

    name: ClassVar[str] = "key-norm"
    paper: ClassVar[str] = "L2 norm of keys, arXiv 2406.11430"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="dense", position_only=False, scores_tokens=True
    )

    capacity: int = parameter(512, "prompt tokens that a head keeps", minimum=64)
    recent: int = parameter(32, "last prompt tokens that stay", minimum=1, maximum=63)

    def lanes(self, model: ModelShape, tokens: int) -> tuple[tuple[Lane, ...], ...]:
        lane = Lane(min(tokens, self.capacity))
        return ((lane,) * model.num_kv_heads,) * model.num_layers

    def select(
        self, model: ModelShape, layer: int, prompt: Prompt, lanes: tuple[Lane, ...]
    ) -> Selection:
        before = prompt.num_tokens - self.recent
        lengths = torch.linalg.vector_norm(prompt.keys[:, :before], dim=2)
        last = torch.arange(before, prompt.num_tokens, device=lengths.device)
        positions = [
            torch.cat([top_positions(-length, lane.keep - self.recent), last])
            for length, lane in zip(lengths, lanes, strict=True)
        ]
        return Selection(list(range(len(lanes))), positions)
