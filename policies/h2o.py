# SPDX-License-Identifier: Apache-2.0
"""Heavy hitters, by the attention they have drawn so far, and the last tokens.

Source: H2O (arXiv 2306.14048, section 4, algorithm 1), with keys at their original
positions. Budgets are shares of the prompt, as in the authors' code; but a share of a
short question is too little for a long reply, so a reply evicts from ``reply`` tokens
on at the earliest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policies.base import (
    Capabilities,
    DensePolicy,
    Lane,
    ModelShape,
    Prompt,
    Selection,
    parameter,
)
from policies.scoring import choice, top_positions

_FLOOR = 32


@dataclass(frozen=True)
class H2O(DensePolicy):
    """Every KV head keeps the tokens of most accumulated attention, and the last."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="dense",
        position_only=False,
        scores_tokens=True,
        statistics=("attention mass",),
        tensor_parallel_exact=True,
    )

    heavy_ratio: float = parameter(
        0.1, "heavy hitters, as a share of the prompt", minimum=0.0, maximum=1.0
    )
    recent_ratio: float = parameter(
        0.1, "last tokens, as a share of the prompt", minimum=0.0, maximum=1.0
    )
    heavy: int | None = parameter(
        None, "heavy hitters as a number, instead of the share", minimum=_FLOOR
    )
    recent: int | None = parameter(
        None, "last tokens as a number, instead of the share", minimum=_FLOOR
    )
    reply: int = parameter(
        256,
        "tokens that a head may hold before a reply evicts, where shares give fewer",
        minimum=2 * _FLOOR,
    )
    norm: str = parameter(
        "none", "none: sums, as in the paper; count: over the queries that saw a token"
    )
    decode: bool = parameter(
        True, "evict while decoding too; false: keep every generated token"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.name, "norm", self.norm, "none", "count")

    @property
    def mass_per_query(self) -> bool:
        return self.norm == "count"

    def lanes(self, model: ModelShape, tokens: int) -> tuple[tuple[Lane, ...], ...]:
        heavy, recent = self._halves(tokens)
        limit = heavy + recent
        lane = Lane(min(tokens, limit))
        if self.decode:
            least = 0 if self.heavy or self.recent else self.reply
            grown = max(limit, least)
            lane = Lane(lane.keep, "heavy", recent * grown // limit, grown)
        return ((lane,) * model.num_kv_heads,) * model.num_layers

    def _halves(self, tokens: int) -> tuple[int, int]:
        """Heavy hitters and last tokens of a prompt; neither half is below a page."""
        heavy = self.heavy or max(int(self.heavy_ratio * tokens), _FLOOR)
        recent = self.recent or max(int(self.recent_ratio * tokens), _FLOOR)
        return heavy, recent

    def select(
        self, model: ModelShape, layer: int, prompt: Prompt, lanes: tuple[Lane, ...]
    ) -> Selection:
        assert prompt.mass is not None, "the record asks for it"
        tokens, heads = prompt.num_tokens, list(range(len(lanes)))
        position = torch.arange(tokens, device=prompt.mass.device)
        if lanes[0].keep == tokens:
            return Selection(heads, [position] * len(heads))
        heavy, recent = self._halves(tokens)
        scores = self._scores(prompt.mass)[:, : tokens - recent]
        window = position[tokens - recent :]
        kept = [torch.cat([top_positions(row, heavy), window]) for row in scores]
        return Selection(heads, kept)

    def _scores(self, mass: Tensor) -> Tensor:
        if self.norm == "none":
            return mass
        # The token at position j was seen by the N - j queries from j on.
        return mass / torch.arange(mass.shape[1], 0, -1, device=mass.device)
