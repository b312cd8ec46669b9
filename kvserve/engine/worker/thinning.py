# SPDX-License-Identifier: Apache-2.0
"""What policies that thin do on the worker: judge groups that leave, and pack the rest.

It happens in each layer when the keys and values of a step are written and nobody has
read them yet. What stays of a group follows from the group alone, so it is the same
whatever else is in the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from kvserve.engine.batch.leaving import Leaving
from kvserve.engine.clock import Clock
from kvserve.engine.devices.device import Device
from kvserve.engine.devices.staging import Staging
from kvserve.engine.worker.rotation import Rotation
from kvserve.errors import UserError
from policies.base import ModelShape
from policies.thinning import Groups, ThinningPolicy


@dataclass(frozen=True)
class StagedLeaving:
    """A request's groups that leave, where kernels read them; as ``Leaving``.

    Attributes:
        positions: of the tokens, ``[groups, G]``.
        most: the largest ``keep`` of each layer.
        policy: which judges them.
        first: which of the tokens stay before others, ``[groups, G]``; ``None``: none.
    """

    raw: torch.Tensor
    packed: torch.Tensor
    keep: torch.Tensor
    positions: torch.Tensor
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    most: list[int]
    policy: ThinningPolicy
    first: torch.Tensor | None


class Thinner:
    """Lets a policy thin groups; lives as long as the engine.

    Args:
        model: all layers; the policy decides on those that are open.
        rotations: of the keys of each layer with a cache of its own.
    """

    def __init__(
        self,
        policy: ThinningPolicy,
        model: ModelShape,
        rotations: Sequence[Rotation | None],
        kernels: Device,
        staging: Staging,
        clock: Clock,
    ) -> None:
        self._policy, self._model = policy, model.open
        self._rotations, self._kernels = rotations, kernels
        self._staging, self._clock = staging, clock
        chosen = self._model.chosen or range(self._model.num_layers)
        self._own = {layer: own for own, layer in enumerate(chosen)}

    def try_policy(self, group: int, device: torch.device) -> None:
        """Let the policy judge a group of each layer, of zeros, before any request.

        What is wrong with a scorer's file shows now, and the file is read.

        Args:
            group: tokens of a group.

        Raises:
            UserError: it cannot judge the tokens of this model.
        """
        model, name = self._model, self._policy.name
        shape = 1, model.num_kv_heads, group
        zeros = torch.zeros(*shape, model.head_size, device=device)
        groups = Groups(zeros, zeros, torch.arange(group, device=device)[None])
        for layer in range(model.num_layers):
            try:
                scores = self._policy.scores(model, layer, groups)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else repr(error)
                raise UserError(
                    f"--policy {name}: cannot judge tokens of layer {layer} of "
                    f"{model.name} ({reason}); measure the model anew with `kvserve "
                    "profile scorer MODEL`, or choose another policy"
                ) from error
            if scores.shape != shape or scores.dtype != torch.float32:
                raise UserError(
                    f"--policy {name}: scores of layer {layer} are {scores.dtype} of "
                    f"shape {tuple(scores.shape)}, not float32 of {shape}"
                )

    def begin(self, leaving: Iterable[Leaving]) -> ThinningStep | None:
        """Look at what leaves in a step; ``None`` if nothing does."""
        staged = [self._stage(one) for one in leaving]
        return ThinningStep(self, staged) if staged else None

    def _stage(self, leaving: Leaving) -> StagedLeaving:
        bring = self._staging.tensor
        count = leaving.groups
        page_size = leaving.page_size
        length = leaving.raw.shape[2] // count * page_size
        positions = leaving.first + np.arange(count * length).reshape(count, length)
        return StagedLeaving(
            bring(leaving.raw.astype(np.int64)),
            bring(leaving.packed.astype(np.int64)),
            bring(leaving.keep),
            bring(positions),
            self._staging.tensors(leaving.sources),
            self._staging.tensors(leaving.targets),
            leaving.keep.max(axis=1).tolist(),
            cast(ThinningPolicy, leaving.policy or self._policy),
            self._protected(leaving, positions),
        )

    def _protected(
        self, leaving: Leaving, positions: npt.NDArray[np.int64]
    ) -> torch.Tensor | None:
        """Which tokens a request has protected."""
        if not leaving.spans:
            return None
        spans = [
            (first <= positions) & (positions < end) for first, end in leaving.spans
        ]
        return self._staging.tensor(np.any(spans, axis=0).astype(np.int64))

    def thin(
        self,
        layer: int,
        leaving: StagedLeaving,
        pool: torch.Tensor,
        cached: torch.Tensor | None,
    ) -> None:
        """Pack what a layer keeps of groups behind what it has kept before.

        Args:
            pool: the cache, ``[num_pages, 1, page_size, bytes or numbers]``.
            cached: position of each of its tokens, ``[num_pages, page_size]``, if a
                layer asks how far keys are.
        """
        if not len(leaving.targets[layer]):
            return
        raw, packed = leaving.raw[layer], leaving.packed[layer]
        with self._clock.selecting():
            keys, values = self._groups(pool, raw, leaving.positions)
            kept = self._judge(layer, leaving, keys, values)
        with self._clock.compacting():
            sources, targets = leaving.sources[layer], leaving.targets[layer]
            moved = [
                torch.cat([before.flatten(0, 1), _picked(of_group, kept)])[sources]
                for before, of_group in (
                    (self._kernels.read_keys(pool, packed), keys),
                    (self._kernels.read_values(pool, packed), values),
                )
            ]
            self._kernels.write(moved[0], moved[1], pool, targets)
            if cached is not None:
                own = leaving.positions.expand(len(kept), *leaving.positions.shape)
                stay = own.gather(2, kept).reshape(-1)
                known = torch.cat([cached[packed].flatten().long(), stay])
                cached.view(-1)[targets] = known[sources].to(cached.dtype)

    def _groups(
        self, pool: torch.Tensor, raw: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are cached, ``[heads, groups, G, d]``."""
        shape = len(raw), *positions.shape
        keys = self._kernels.read_keys(pool, raw)
        values = self._kernels.read_values(pool, raw)
        width = keys.shape[-1]
        return keys.reshape(*shape, width), values.reshape(*shape, width)

    def _judge(
        self,
        layer: int,
        leaving: StagedLeaving,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Places in their groups of the tokens that stay, ``[heads, groups, most]``.

        Ascending; of a head that keeps fewer than ``most`` only the first ones count.
        """
        projected, rotation = keys.float().transpose(0, 1), self._rotations[layer]
        if rotation is not None:
            projected = rotation.undone(projected, leaving.positions)
        groups = Groups(projected, values.float().transpose(0, 1), leaving.positions)
        scores = leaving.policy.scores(self._model, self._own[layer], groups)
        by_head = scores.transpose(0, 1)
        kept = leaving.keep[layer], leaving.most[layer]
        return best_places(by_head, *kept, leaving.first)


def best_places(
    scores: torch.Tensor,
    keep: torch.Tensor,
    most: int,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Places of the highest scores, ascending; of equal ones the later stays.

    Scores are equal if they are to 13 bits. A token that comes twice has the same key
    in the first layer, but for what is lost when its rotation is undone.

    Args:
        scores: ``[heads, groups, G]``.
        keep: how many of a group each head keeps, ``[heads]``, at most ``most``.
        first: 1 for tokens that stay before all others, else 0, ``[groups, G]``.

    Returns:
        ``[heads, groups, most]``, of which the first ``keep`` count.
    """
    length = scores.shape[-1]
    order = _rounded(scores).flip(-1).argsort(dim=-1, descending=True, stable=True)
    if first is not None:
        ranked = first.flip(-1).expand(scores.shape).gather(-1, order)
        before = ranked.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, before)
    places = length - 1 - order[..., :most]
    beyond = torch.arange(most, device=scores.device) >= keep[:, None, None]
    ascending = places.masked_fill(beyond, length).sort(dim=-1).values
    return ascending.clamp(max=length - 1)


def _rounded(scores: torch.Tensor) -> torch.Tensor:
    """Round float32 to 13 bits, 12 of which are stored."""
    bits = scores.contiguous().view(torch.int32)
    return ((bits + (1 << 10)) & ~((1 << 11) - 1)).view(torch.float32)


def _picked(of_group: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Gather ``[heads, groups, G, d]`` at ``[heads, groups, most]``, end to end."""
    width = of_group.shape[-1]
    picked = of_group.gather(2, places[..., None].expand(*places.shape, width))
    return picked.reshape(-1, width)


@dataclass(frozen=True)
class ThinningStep:
    """One step in which some group leaves, as its layers go by."""

    thinner: Thinner
    leaving: list[StagedLeaving]

    def thin(self, layer: int, pool: torch.Tensor, cached: torch.Tensor | None) -> None:
        for one in self.leaving:
            self.thinner.thin(layer, one, pool, cached)
