# SPDX-License-Identifier: Apache-2.0
"""Undoes the rotation of cached keys, for policies that judge keys as projected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kvserve.errors import UserError


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding (RoPE, arXiv 2104.09864) of a layer.

    Attributes:
        cos_sin: cosines, then sines, of each position, ``[positions, rotated]``; they
            may be scaled, as YaRN does.
        halves: whether pairs are number ``i`` of either half, else neighbours.
    """

    cos_sin: torch.Tensor
    halves: bool

    def undone(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return keys before rotation.

        Args:
            keys: ``[n, heads, tokens, d]``, float32; numbers behind those that are
                rotated stay.
            positions: ``[n, tokens]``.
        """
        cos, sin = self.cos_sin[positions].float()[:, None].chunk(2, dim=-1)
        rotated = self.cos_sin.shape[-1]
        turned, rest = keys[..., :rotated], keys[..., rotated:]
        if self.halves:
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
        size = cos.square() + sin.square()
        pair = (
            (first * cos + second * sin) / size,
            (second * cos - first * sin) / size,
        )
        join = torch.cat if self.halves else _neighbours
        return torch.cat([join(pair, dim=-1), rest], dim=-1)


def _neighbours(pair: tuple[torch.Tensor, torch.Tensor], dim: int) -> torch.Tensor:
    return torch.stack(pair, dim=dim).flatten(-2)


def rotation_of(model: nn.Module, layer_name: str) -> Rotation | None:
    """Find how the keys of an attention layer are rotated; ``None``: they are not.

    vLLM's models have the rotary embedding beside the attention layer.

    Raises:
        UserError: it is of a kind that is not known here.
    """
    around, _, _ = layer_name.rpartition(".")
    embedding = getattr(model.get_submodule(around), "rotary_emb", None)
    if embedding is None:
        return None
    cos_sin = getattr(embedding, "cos_sin_cache", None)
    if not isinstance(cos_sin, torch.Tensor) or cos_sin.ndim != 2:
        raise UserError(
            f"--policy: keys of this model are rotated by {type(embedding).__name__}, "
            "which cannot be undone here; choose a policy that does not judge keys, "
            "such as retrieval"
        )
    return Rotation(cos_sin, bool(embedding.is_neox_style))
