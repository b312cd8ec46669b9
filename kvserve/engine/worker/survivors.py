# SPDX-License-Identifier: Apache-2.0
"""What a request keeps of its prompt, layer by layer, until all layers are done."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvserve.engine.devices.device import Device
from kvserve.plan.dense import DensePlan
from kvserve.plan.lanes import PageArray
from policies.base import Prompt, Selection


@dataclass(frozen=True)
class Reader:
    """A request that reads its prompt in this step.

    Attributes:
        plan: its page plan.
        tokens: tokens ``[first, last)`` of the step that are its chunk.
        length: tokens of its prompt that are cached when the step is done.
        pages: its pages, ``[num_layers, num_kv_heads, blocks]``, of layers that are not
            local.
        local: the others, when the prompt is read: what they see of its end.
        kept: the front of its page list, to which survivors move.
    """

    request_id: str
    plan: DensePlan
    tokens: slice
    length: int
    pages: torch.Tensor
    local: dict[int, LastPages]
    kept: PageArray

    @property
    def is_done(self) -> bool:
        return self.length == self.plan.prompt_tokens


@dataclass(frozen=True)
class LastPages:
    """Where a layer has the last tokens of a prompt.

    Attributes:
        pages: ``[num_kv_heads, blocks]``.
        skip: tokens of the first page that are not among them.
        keep: how many they are.
    """

    pages: torch.Tensor
    skip: int
    keep: int


@dataclass(frozen=True)
class Survivors:
    """What one layer of a request keeps, to be written when all layers are done.

    ``keys``, ``values`` ``[n, d]``, of the pool's type, ``positions`` and ``mass``
    ``[n]`` are lane after lane.
    """

    selection: Selection
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mass: torch.Tensor | None


def select(
    reader: Reader,
    layer: int,
    prompt: Prompt,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Survivors:
    """Let the policy select from a prompt, and gather what it keeps.

    Args:
        keys, values: as they are cached, ``[H_kv, n, d]``.
    """
    rule, lanes, mass = reader.plan.rule, reader.plan.lanes[layer], prompt.mass
    model = rule.model.open
    own = layer if model.chosen is None else model.chosen.index(layer)
    chosen = rule.policy.select(model, own, prompt, lanes)
    lane_heads = list(zip(chosen.head_of_lane, chosen.positions, strict=True))
    if [len(kept) for _, kept in lane_heads] != [lane.keep for lane in lanes]:
        raise RuntimeError(f"policy {rule.policy.name} broke its own lanes")

    def gather(source: torch.Tensor) -> torch.Tensor:
        rows = [source[head].index_select(0, kept) for head, kept in lane_heads]
        return torch.cat(rows)

    return Survivors(
        chosen,
        gather(keys),
        gather(values),
        torch.cat(chosen.positions),
        None if mass is None else gather(mass),
    )


def keep_last(
    kernels: Device, kv_cache: torch.Tensor, reader: Reader, layer: int
) -> Survivors:
    """Gather what a local layer sees of the end of a prompt."""
    last = reader.local[layer]
    heads = len(last.pages)
    of_them = slice(last.skip, last.skip + last.keep)
    keys = kernels.read_keys(kv_cache, last.pages).flatten(1, 2)[:, of_them]
    values = kernels.read_values(kv_cache, last.pages).flatten(1, 2)[:, of_them]
    first = reader.plan.prompt_tokens - last.keep
    positions = torch.arange(first, reader.plan.prompt_tokens, device=last.pages.device)
    weighs = reader.plan.rule.weighs
    return Survivors(
        Selection([*range(heads)], [positions] * heads),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        positions.repeat(heads),
        torch.zeros(heads * last.keep, device=keys.device) if weighs else None,
    )
