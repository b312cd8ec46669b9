# SPDX-License-Identifier: Apache-2.0
"""Attention statistics that flash kernels do not return, computed exactly.

A chunk's queries see all earlier keys, so their rows of the attention matrix are
complete, and sums over rows add up chunk by chunk to those of the whole prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 64
"""Queries at once: their logits should stay in the cache of a core."""


def attention_mass(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Sum of attention that each key receives from a chunk of queries.

    Args:
        query: The last ``n`` tokens' queries, ``[H_q, n, d]``.
        key: All ``m`` keys so far, the chunk's included, ``[H_kv, m, d]``.

    Returns:
        ``[H_kv, m]``, float32, summed over the chunk and over a group's query heads.
    """
    kv_heads, keys, width = key.shape
    queries = query.shape[1]
    grouped = (query.float() * scale).view(kv_heads, -1, queries, width)
    transposed = key.float().transpose(1, 2).contiguous()
    mass = torch.zeros(kv_heads, keys, device=key.device)
    future = torch.ones(_TILE, _TILE, dtype=torch.bool, device=key.device).triu(1)
    for head in range(kv_heads):
        for first in range(0, queries, _TILE):
            tile = grouped[head, :, first : first + _TILE]
            rows = tile.shape[1]
            seen = keys - queries + first + rows
            # Only the last keys can lie in a query's future.
            logits = (tile.reshape(-1, width) @ transposed[head, :, :seen]).view(
                len(tile), rows, seen
            )
            own = logits[..., seen - rows :]
            own.masked_fill_(future[:rows, :rows], float("-inf"))
            weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
            share = 1 / weights.sum(dim=-1)
            mass[head, :seen] += share.flatten() @ weights.flatten(0, 1)
    return mass


def row_attention(query: Tensor, key: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of one query per row over the first ``lengths`` keys of its row.

    Args:
        query: ``[rows, G, d]``.
        key: ``[rows, m, d]``; what lies beyond a row's length is not read.
        lengths: ``[rows]``.

    Returns:
        ``[rows, m]``, float32, summed over the group; 0 beyond the length.
    """
    beyond = torch.arange(key.shape[1], device=key.device)[None] >= lengths[:, None]
    logits = (query.float() * scale) @ key.float().transpose(1, 2)
    logits.masked_fill_(beyond[:, None], float("-inf"))
    return logits.softmax(dim=-1).sum(dim=1)


def lightest(mass: Tensor, position: Tensor, safe_from: Tensor) -> Tensor:
    """Slot of each row's token of least mass before position ``safe_from``.

    Of equal masses the earliest position goes.

    Args:
        mass, position: ``[rows, slots]``; an empty slot has position -1.
        safe_from: ``[rows]``.
    """
    barred = (position < 0) | (position >= safe_from[:, None])
    least = mass.masked_fill(barred, float("inf")).amin(dim=1, keepdim=True)
    tied = (mass == least) & ~barred
    far = torch.iinfo(position.dtype).max
    return position.masked_fill(~tied, far).argmin(dim=1)
