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

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvserve.errors import UserError
from policies.base import (
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)
from policies.history import (
    Keeps,
    even_shares,
    history_path,
    keeps_within,
    load_shares,
)

if TYPE_CHECKING:
    from torch import Tensor

THINNING = Capabilities(
    prefill="streaming",
    position_only=False,
    scores_tokens=True,
    prefix_cacheable=True,
)


_PAGE = 32


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
    recent: int = parameter(96, "last tokens, in whole pages", minimum=1)
    group: int = parameter(
        128, "tokens that are judged together, in whole pages", minimum=1
    )

    profile: str | None = parameter(
        None,
        "file of `kvserve profile scorer`, which says how much each head keeps; "
        "without it, the one that ships for the model, else all heads keep as much",
    )

    def groups(self, length: int) -> int:
        """Count the groups that have left the window after ``length`` tokens."""
        return max(length - self.sinks - self.recent, 0) // self.group

    def files(self, model_name: str) -> dict[str, Path]:
        path = history_path(self.profile, model_name)
        found = {"profile": path} if path.is_file() else {}
        return {**super().files(model_name), **found}

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        """Share out what the budget leaves for history, as the profile has it.

        Raises:
            UserError: the budget does not pay for sinks and window, or the profile is
                not of this model.
        """
        keeps = self._keeps(model, self.length or tokens)
        return tuple(tuple(map(self._head, layer)) for layer in keeps)

    def remark(self, model: ModelShape) -> str:
        """Say what heads keep of what leaves their windows."""
        layers = self.budgets(model, model.max_tokens)
        keeps = [head.keep for layer in layers for head in layer]
        if load_shares(self.profile, model):
            return (
                f"keeps {min(keeps)} to {max(keeps)} of each {self.group} tokens that "
                f"leave a head's window, on average {sum(keeps) / len(keeps):.1f}"
            )
        return (
            f"keeps {keeps[0]} of each {self.group} tokens that leave a head's window, "
            f"of all heads alike, for it is not known which of {model.name} need more: "
            "`kvserve profile scorer MODEL` finds out"
        )

    def _keeps(self, model: ModelShape, length: int) -> Keeps:
        """Tokens of each group that every head keeps for a request of ``length``."""
        groups, heads = self.groups(length), model.num_layers * model.num_kv_heads
        # However few tokens of its history a head keeps.
        floor = length - groups * self.group
        if self.budget * length < floor:
            least = math.ceil(floor / length * 1000) / 1000
            raise UserError(
                f"--policy-arg budget={self.budget}: what no head has let go of yet "
                f"takes {least:.1%} of {length} tokens; give at least {least}, or a "
                "smaller recent or group"
            )
        # The last page of a head's history is half empty, on average; at a length at
        # which a group leaves it is held once more, with what stays of the group.
        leaves = (length + _PAGE - self.sinks - self.recent) % self.group == 0
        history = max(self.budget * length - floor - _PAGE / 2 * (1 + leaves), 0)
        of_group = min(history / max(groups + leaves, 1), self.group)
        if self.budget == 1:
            of_group = self.group
        total = math.floor(of_group * heads + 1e-6)
        shares = load_shares(self.profile, model) or even_shares(model)
        return keeps_within(shares, self.group, total)

    def _head(self, keep: int) -> HeadBudget:
        return HeadBudget(self.sinks, self.recent, group=self.group, keep=keep)

    @abstractmethod
    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        """Judge tokens: of each head and group those of the highest scores stay.

        Args:
            layer: Index of the layer among those that the policy decides on.

        Returns:
            ``[n, H_kv, G]``, float32, finite.
        """
