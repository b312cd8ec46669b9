# SPDX-License-Identifier: Apache-2.0
"""Attention statistics that flash kernels do not return, computed exactly.

A chunk's queries see all earlier keys, so their rows of the attention matrix are
complete, and sums over rows add up chunk by chunk to those of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import torch
from torch import Tensor

from kvserve.kernels.score_form import (
    Positions,
    ScoreForm,
    bent,
    positions_for,
    weights_of,
)

_TILE = 64
"""Queries at once: their logits should stay in the cache of a core."""


@dataclass(frozen=True)
class CachedRows:
    """Where the cached tokens of some rows of a page table lie.

    Attributes:
        page_table: ``[R, W]``, int32.
        lengths: Tokens of each row of the table, ``[R]``, int64.
        rows: Those that are meant, ``[n]``, int64.
        width: Pages of the longest of them or more, where the host knows: to look it
            up would wait for the device.
    """

    page_table: Tensor
    lengths: Tensor
    rows: Tensor
    page_size: int
    width: int | None = None

    def pages(self) -> Tensor:
        """Pages of the rows meant, ``[n, w]``, as wide as the longest of them."""
        return self.narrowed_table()[self.rows].long()

    def narrowed_table(self) -> Tensor:
        """The page table as far as the rows meant go, ``[R, w]``."""
        width = self.width
        if width is None:
            width = int(-(-self.lengths[self.rows].max() // self.page_size))
        return self.page_table[:, :width]


def attention_mass(
    query: Tensor, key: Tensor, scale: float, form: ScoreForm | None = None
) -> Tensor:
    """Sum of attention that each key receives from a chunk of queries.

    Args:
        query: The last ``n`` tokens' queries, ``[H_q, n, d]``.
        key: All ``m`` keys so far, the chunk's included, ``[H_kv, m, d]``.
        form: How the model scores; keys stand where they lie.

    Returns:
        ``[H_kv, m]``, float32, summed over the chunk and over a group's query heads.
    """
    kv_heads, keys, width = key.shape
    queries = query.shape[1]
    # Base 2, for which PyTorch has the faster exponential, unless there is a form.
    grouped = query.float() * (scale if form else scale * log2(e))
    grouped = grouped.view(kv_heads, -1, queries, width)
    transposed = key.float().transpose(1, 2).contiguous()
    mass = torch.zeros(kv_heads, keys, device=key.device)
    future = torch.ones(_TILE, _TILE, dtype=torch.bool, device=key.device).triu(1)
    heads = torch.arange(kv_heads, device=key.device)
    for head in range(kv_heads):
        for first in range(0, queries, _TILE):
            tile = grouped[head, :, first : first + _TILE]
            rows = tile.shape[1]
            seen = keys - queries + first + rows
            logits = (tile.reshape(-1, width) @ transposed[head, :, :seen]).view(
                len(tile), rows, seen
            )
            if form:
                logits = _bent_tile(logits, form, heads[head : head + 1])
            # Only the last keys can lie in a query's future.
            own = logits[..., seen - rows :]
            own.masked_fill_(future[:rows, :rows], float("-inf"))
            if form:
                weights = weights_of(
                    logits.transpose(0, 1), form, heads[head : head + 1]
                )
                mass[head, :seen] += weights.sum(dim=(0, 1))
                continue
            weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp2_()
            share = 1 / weights.sum(dim=-1)
            mass[head, :seen] += share.flatten() @ weights.flatten(0, 1)
    return mass


def _bent_tile(logits: Tensor, form: ScoreForm, head: Tensor) -> Tensor:
    """Bend a tile's ``logits [G, n, m]``, of the last ``n`` of ``m`` tokens."""
    rows, seen = logits.shape[1:]
    token = torch.arange(seen, device=logits.device)
    distance = token - token[seen - rows :, None]
    return bent(logits.transpose(0, 1), form, head, distance).transpose(0, 1)


def row_attention(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    scale: float,
    form: ScoreForm | None = None,
    kv_heads: Tensor | None = None,
    distance: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row over the first ``lengths`` keys of its row.

    Args:
        query: ``[rows, G, d]``.
        key: ``[rows, m, d]``; what lies beyond a row's length is not read.
        lengths: ``[rows]``.
        form: How the model scores.
        kv_heads: The KV head of each row, ``[rows]``; a form asks for it.
        distance: Of keys from their query, ``[rows, m]``; slopes ask for it.

    Returns:
        ``[rows, m]``, float32, summed over the group; 0 beyond the length.
    """
    heads = lengths if kv_heads is None else kv_heads
    beyond = torch.arange(key.shape[1], device=key.device)[None] >= lengths[:, None]
    logits = (query.float() * scale) @ key.float().transpose(1, 2)
    logits = bent(logits, form, heads, distance)
    logits.masked_fill_(beyond[:, None], float("-inf"))
    return weights_of(logits, form, heads).sum(dim=1)


def add_row_attention(
    query: Tensor,
    key: Tensor,
    cached: CachedRows,
    scale: float,
    mass: Tensor,
    form: ScoreForm | None = None,
    positions: Positions | None = None,
) -> None:
    """Add the attention of one query per row to the mass of its cached tokens.

    Args:
        query: ``[R, G, d]``, one for each row of the page table.
        key: Keys of ``cached.pages()``, ``[n, w, page_size, d]``.
        mass: ``[num_pages, page_size]``, float32, written in place.
        form: How the model scores; rows are then ``(token, KV head)`` in this order.
        positions: Of the tokens of the rows and of the pool; slopes ask for them.
    """
    rows, size = cached.rows, cached.page_size
    lengths, pages = cached.lengths[rows], cached.pages()
    kv_heads = form.kv_heads(query.shape[1]) if form else 1
    distance, known = None, positions_for(form, positions)
    if known is not None:
        own = known.own[rows // kv_heads]
        distance = known.cached[pages].flatten(1) - own[:, None]
    drawn = row_attention(
        query[rows],
        key.flatten(1, 2),
        lengths,
        scale,
        form,
        rows % kv_heads,
        distance,
    )
    places = torch.arange(size, device=mass.device)
    slots = pages[..., None] * size + places
    mass.view(-1).index_add_(0, slots.flatten(), drawn.flatten())


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


def lightest_slots(
    cached: CachedRows,
    mass: Tensor,
    position: Tensor,
    own: Tensor,
    safe_from: Tensor,
    by_count: bool,
) -> Tensor:
    """Slot in the pool of each row's :func:`lightest` token, ``[n]``.

    Args:
        mass, position: Of cached tokens, ``[num_pages, page_size]``.
        own: Position of each row's query, ``[R]``.
        safe_from: ``[R]``.
        by_count: Divide mass by the queries that saw a token.
    """
    rows, size, pages = cached.rows, cached.page_size, cached.pages()
    held = position[pages].flatten(1)
    beyond = torch.arange(held.shape[1], device=held.device)
    held = held.masked_fill(beyond >= cached.lengths[rows, None], -1)
    weight = mass[pages].flatten(1)
    if by_count:
        weight = weight / (own[rows, None] - held)
    victim = lightest(weight, held, safe_from[rows])
    page = pages.gather(1, (victim // size)[:, None])[:, 0]
    return page * size + victim % size
