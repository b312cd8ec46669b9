# SPDX-License-Identifier: Apache-2.0
"""The kernels of a GPU in plain PyTorch: slow, short, right on any device.

Symbols: ``D`` head size, ``G`` query heads that share a KV head, ``W`` width of the
page table. ``pool`` is ``[num_pages, 1, page_size, 2 * D]``; a token's K is
``pool[p, 0, t, :D]`` and its V ``pool[p, 0, t, D:]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvserve.kernels.score_form import RowScores, bent, weights_of


def write_rows(key: Tensor, value: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Scatter the K and V of ``n`` (token, KV head) pairs into their slots.

    Args:
        key, value: ``[n, D]``.
        pool: ``[num_pages, 1, page_size, 2 * D]``, written in place.
        slots: ``[n]`` int64, ``page * page_size + offset``; a negative one is skipped.
    """
    wanted = slots >= 0
    tokens = torch.cat([key, value], dim=-1)[wanted]
    pool.view(-1, pool.shape[-1])[slots[wanted]] = tokens.to(pool.dtype)


def row_attention(
    query: Tensor,
    pool: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    scores: RowScores | None = None,
    gaps: Tensor | None = None,
) -> Tensor:
    """Causal attention of every row's queries over its own pages.

    Row ``r`` owns ``query[query_start[r] : query_start[r + 1]]``, the LAST tokens of
    its sequence: of ``q_len`` queries, query ``i`` sees keys
    ``j <= seq_lens[r] - q_len + i``. Softmax is float32 (float64 for float64 inputs).

    Args:
        query: ``[n, G, D]``.
        pool: ``[num_pages, 1, page_size, 2 * D]``.
        query_start: ``[rows + 1]`` int32.
        seq_lens: ``[rows]`` int32.
        page_table: ``[rows, W]`` int32; key ``j`` of row ``r`` is at offset
            ``j % page_size`` of page ``page_table[r, j // page_size]``.
        scores: how the model scores, and which heads and tokens rows are of.
        gaps: keys ``gap[0] .. gap[1] - 1`` of each row, which count in ``seq_lens`` but
            no query sees, ``[rows, 2]`` int32.

    Returns:
        ``[n, G, D]`` of query's type; zeros for a query that sees no key.
    """
    out = torch.zeros_like(query)
    starts = query_start.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        if last == first or seq_len == 0:
            continue
        asked, pages = query[first:last], page_table[row]
        keys, values = gather_row(pool, pages, seq_len)
        gap = _gap_of(gaps, row)
        weights = _weights(asked, keys, scale, scores, row, pages, gap)
        found = torch.einsum("qgk,kd->qgd", weights, values.to(weights.dtype))
        out[first:last] = found.to(query.dtype)
    return out


def add_row_mass(
    query: Tensor,
    pool: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    drawn: Tensor,
    scores: RowScores | None = None,
    gaps: Tensor | None = None,
) -> None:
    """Add what cached tokens draw from rows of one query; other rows add nothing.

    Args:
        drawn: ``[num_pages, page_size]``, written in place: probabilities, summed over
            the ``G`` heads. All others as in :func:`row_attention`.
    """
    starts = query_start.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        if last - first != 1 or seq_len == 0:
            continue
        keys, _ = gather_row(pool, page_table[row], seq_len)
        asked, pages = query[first:last], page_table[row]
        gap = _gap_of(gaps, row)
        weights = _weights(asked, keys, scale, scores, row, pages, gap)
        token = torch.arange(seq_len, device=drawn.device)
        page = page_table[row].long()[token // pool.shape[2]]
        drawn[page, token % pool.shape[2]] += weights.sum((0, 1)).to(drawn.dtype)


def gather_row(pool: Tensor, pages: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """K and V ``[seq_len, D]`` of the sequence in ``pages`` (``[W]``), in order."""
    page_size = pool.shape[2]
    used = pages[: -(-seq_len // page_size)].long()
    tokens = pool[used].reshape(-1, pool.shape[-1])[:seq_len]
    keys, values = tokens.chunk(2, dim=-1)
    return keys, values


def _gap_of(gaps: Tensor | None, row: int) -> slice:
    return slice(0) if gaps is None else slice(*gaps[row].tolist())


def _weights(
    query: Tensor,
    keys: Tensor,
    scale: float,
    scores: RowScores | None,
    row: int,
    pages: Tensor,
    gap: slice,
) -> Tensor:
    """What ``query [q_len, G, D]`` gives each of ``keys [seq_len, D]``."""
    precise = torch.promote_types(query.dtype, torch.float32)
    q_len, seq_len = query.shape[0], keys.shape[0]
    logits = scale * torch.einsum("qgd,kd->qgk", query.to(precise), keys.to(precise))
    token = torch.arange(seq_len, device=query.device)
    form, heads, distance = None, token, None
    if scores is not None:
        group, form = query.shape[1], scores.form
        heads = scores.kv_heads(group)[row : row + 1]
        distance = scores.distance(row, group, q_len, seq_len, pages)
    logits = bent(logits, form, heads, distance)
    last_seen = torch.arange(seq_len - q_len, seq_len, device=query.device)
    hidden = token[None, None, :] > last_seen[:, None, None]
    if form is not None and form.window:
        hidden |= token[None, None, :] <= last_seen[:, None, None] - form.window
    hidden[..., gap] = True
    weights = weights_of(logits.masked_fill(hidden, float("-inf")), form, heads)
    return weights.masked_fill(hidden, 0.0)  # NaN where a query sees no key


def copy_pages(pool: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy page ``source[i]`` to page ``target[i]``: both ``[n]`` int64, disjoint."""
    pool[target] = pool[source]
