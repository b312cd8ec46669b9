# SPDX-License-Identifier: Apache-2.0
"""Heads whose view of the prompt differs keep everything, the others a summary of it.

Source: Task-KV (arXiv 2501.15113, section IV): the classes are decided anew for every
prompt. Where the paper is silent, the parameters say what we chose, and what else
there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

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
class Heterogeneous(DensePolicy):
    """Heads far from the layer's semantic centre, and the nearest, keep everything."""

    name: ClassVar[str] = "heterogeneous"
    paper: ClassVar[str] = "Task-KV, arXiv 2501.15113"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="dense", position_only=False, scores_tokens=True
    )

    budget: float = parameter(
        0.4, "share of a layer's prompt entries that it keeps", minimum=0.0, maximum=1.0
    )
    beta: float = parameter(
        0.25,
        "share of heterogeneous heads in the first layer",
        minimum=0.0,
        maximum=1.0,
    )
    m: int | None = parameter(
        None, "heterogeneous heads in the last layer; default: an eighth", minimum=0
    )
    top: int = parameter(256, "tokens that make a head's semantic vector", minimum=1)
    window: int = parameter(32, "last prompt tokens, which observe", minimum=1)
    sinks: int = parameter(16, "first tokens that every head keeps", minimum=1)
    recent: int = parameter(256, "last prompt tokens that every head keeps", minimum=32)
    kernel: int = parameter(7, "width of average pooling for middle tokens", minimum=1)
    bounded_tail: bool = parameter(
        False, "let generated tokens of other heads replace the last `recent` ones"
    )
    distance: str = parameter("l2", "between semantic vectors: l2, cosine or unit")
    centre_head: str = parameter(
        "extra", "the nearest head is full besides (extra) or among (included) these"
    )
    round: str = parameter("floor", "of the number of full heads: floor or half-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        odd(self.name, "kernel", self.kernel)
        choice(self.name, "distance", self.distance, "l2", "cosine", "unit")
        choice(self.name, "centre_head", self.centre_head, "extra", "included")
        choice(self.name, "round", self.round, "floor", "half-up")
        if self.window > self.recent:
            raise UserError(
                f"--policy-arg window={self.window}: must be at most "
                f"recent={self.recent} (policy {self.name})"
            )

    @property
    def observation_window(self) -> int:
        return self.window

    def lanes(self, model: ModelShape, tokens: int) -> tuple[tuple[Lane, ...], ...]:
        if self.budget >= 1 or tokens <= self.sinks + self.recent + 1:
            return ((Lane(tokens),) * model.num_kv_heads,) * model.num_layers
        self._check(model)
        layers = []
        for layer in range(model.num_layers):
            far, centre, kept = self._split(layer, model, tokens)
            other = Lane(kept)
            if self.bounded_tail:
                other = Lane(kept, "ring", self._ends(kept)[1])
            full = far + centre
            others = model.num_kv_heads - full
            layers.append((Lane(tokens),) * full + (other,) * others)
        return tuple(layers)

    def _check(self, model: ModelShape) -> None:
        """Refuse a budget that no request of the server can meet."""
        least = (self.window + 1) / model.max_tokens
        if self.budget < least:
            raise UserError(
                f"--policy-arg budget={self.budget}: leaves a head fewer than "
                f"{self.window + 1} of {model.max_tokens} tokens, its window and one "
                f"sink; give at least {math.ceil(least * 1e4) / 1e4}, or a smaller "
                "window"
            )

    def heterogeneous_heads(self, layer: int, model: ModelShape) -> int:
        """Heads of a layer that are full for being far away (equation 16)."""
        heads, last = model.num_kv_heads, max(model.num_layers - 1, 1)
        top = max(1, heads // 8) if self.m is None else self.m
        # Exact arithmetic: floor(8.0) must not be 7 on some machine.
        bottom = heads * Fraction(str(self.beta))
        number = bottom - (bottom - top) * Fraction(layer, last)
        if self.round == "half-up":
            number += Fraction(1, 2)
        return min(int(number), heads)

    def _split(
        self, layer: int, model: ModelShape, tokens: int
    ) -> tuple[int, bool, int]:
        """Divide a layer's budget (equation 17), or do with fewer full heads.

        The paper never ran a budget too small for its rule. There, the centre head
        goes first, then full heads one by one, then the window, then the sinks.

        Returns:
            Full heads far from the centre, whether the centre head is full too, and
            the tokens that each other head keeps.
        """
        heads = model.num_kv_heads
        entries = Fraction(str(self.budget)) * heads * tokens
        far = self.heterogeneous_heads(layer, model)
        fallbacks = [(number, False) for number in range(far, -1, -1)]
        first = (far, True) if self.centre_head == "extra" else (far - 1, far > 0)
        for number, centre in [first, *fallbacks]:
            full = number + centre
            if not number >= 0 or full >= heads:
                continue
            kept = int((entries - tokens * full) // (heads - full))
            if kept >= self.sinks + self.recent:
                return number, centre, kept
        return 0, False, max(int(entries // heads), self.window + 1)

    def _ends(self, kept: int) -> tuple[int, int]:
        """Sinks and last tokens among the ``kept`` tokens of a head that is not full.

        Where the budget is too small for both, the window shrinks, then the sinks.
        """
        recent = max(min(self.recent, kept - self.sinks), self.window)
        return min(self.sinks, kept - recent), recent

    def select(
        self, model: ModelShape, layer: int, prompt: Prompt, lanes: tuple[Lane, ...]
    ) -> Selection:
        observed = observed_attention(prompt).mean(dim=1)
        far, centre, _ = self._split(layer, model, prompt.num_tokens)
        full, others = self._classes(observed, prompt.values, far, centre)
        everything = torch.arange(prompt.num_tokens, device=observed.device)
        positions = [everything] * len(full)
        smooth = pooled(observed, self.kernel)
        for head, lane in zip(others, lanes[len(full) :], strict=True):
            positions.append(self._summary(smooth[head], lane.keep))
        return Selection(full + others, positions)

    def _classes(
        self, observed: Tensor, values: Tensor, far: int, centre: bool
    ) -> tuple[list[int], list[int]]:
        """Heads that keep everything, farthest first, and all others."""
        vectors = self._semantic_vectors(observed, values)
        distance = self._distance(vectors).tolist()
        # Of equal distances the lower head goes first, from either end.
        ranked = sorted(range(len(distance)), key=lambda head: (-distance[head], head))
        full, rest = ranked[:far], ranked[far:]
        if centre:
            nearest = min(rest, key=lambda head: (distance[head], head))
            full.append(nearest)
        return full, sorted(set(rest) - set(full))

    def _distance(self, vectors: Tensor) -> Tensor:
        """Distance of each head's semantic vector from their mean, ``[H_kv]``."""
        if self.distance == "unit":
            vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        centre = vectors.mean(dim=0, keepdim=True)
        if self.distance == "cosine":
            return 1 - torch.cosine_similarity(vectors, centre)
        distance: Tensor = torch.linalg.vector_norm(vectors - centre, dim=1)
        return distance

    def _summary(self, scores: Tensor, kept: int) -> Tensor:
        """Sinks, middle activations and last tokens of one head, ascending."""
        sinks, recent = self._ends(kept)
        last = len(scores) - recent
        positions = torch.arange(len(scores), device=scores.device)
        middle = top_positions(scores[sinks:last], kept - sinks - recent) + sinks
        return torch.cat([positions[:sinks], middle, positions[last:]])

    def _semantic_vectors(self, attention: Tensor, values: Tensor) -> Tensor:
        """What the end of the prompt reads from each head, ``[H_kv, d]``.

        The weighted values of the tokens attended to most, weights as they are.
        """
        count = min(self.top, attention.shape[1])
        chosen = torch.stack([top_positions(row, count) for row in attention])
        weights = attention.gather(1, chosen)
        width = values.shape[2]
        read = values.gather(1, chosen[..., None].expand(-1, -1, width))
        return (weights[..., None] * read).sum(dim=1)
