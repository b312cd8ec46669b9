# SPDX-License-Identifier: Apache-2.0
"""Policies that thin what leaves the window: a head keeps ``k`` of every ``G`` tokens.

Behind the sinks a request's tokens are counted in groups of ``G``. When a group lies
wholly behind the window of every query to come, each KV head keeps the ``k`` tokens of
it that score highest, ``k`` a number of its own. A score follows from what is known
when a group leaves, its keys and values, and never from what is asked later. Decisions
at write time as in DMS (arXiv 2506.05345) and KVzap (arXiv 2601.07891), but with counts
that positions alone decide.

A policy of this kind is a scorer: one method, in a file of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policies.base import (
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)

if TYPE_CHECKING:
    from torch import Tensor

THINNING = Capabilities(
    prefill="streaming",
    position_only=False,
    scores_tokens=True,
)


@dataclass(frozen=True)
class Groups:
    """Groups that have left the window, with all KV heads of one layer.

    Attributes:
        keys: As the model projects them, before rotation, ``[n, H_kv, G, d]``, float32.
        values: ``[n, H_kv, G, d]``, float32.
        positions: Of the tokens in their requests, ``[n, G]``, int64.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class ThinningPolicy(StreamingPolicy):
    """A policy that judges tokens when they leave the window."""

    budget: float = parameter(
        0.25, "share of a request's tokens that is kept", minimum=0.0, maximum=1.0
    )
    length: int | None = parameter(
        None,
        "tokens of the request that the budget is a share of; without it the longest "
        "that the server takes",
        minimum=1,
    )
    sinks: int = parameter(32, "first tokens, in whole pages", minimum=1)
    recent: int = parameter(128, "last tokens, in whole pages", minimum=1)
    group: int = parameter(
        128, "tokens that are judged together, in whole pages", minimum=1
    )

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        length = min(self.length or tokens, tokens)
        # On average a group that is not yet complete is held besides.
        held = self.sinks + self.recent + self.group / 2
        history = max(length - held, 1)
        keep = round(max(self.budget * length - held, 0) / history * self.group)
        head = HeadBudget(
            self.sinks, self.recent, group=self.group, keep=min(keep, self.group)
        )
        return ((head,) * model.num_kv_heads,) * model.num_layers

    @abstractmethod
    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        """Judge tokens: of each head and group those of the highest scores stay.

        Args:
            layer: Index of the layer among those that the policy decides on.

        Returns:
            ``[n, H_kv, G]``, float32, finite.
        """
