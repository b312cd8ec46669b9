# SPDX-License-Identifier: Apache-2.0
"""Attending to head pages on a GPU, in Triton; ``triton_pages`` writes them.

Symbols: ``D`` head size, ``G`` query heads that share a KV head, ``W`` width of the
page table, ``n`` all queries of the call. The pool is contiguous
``[num_pages, 1, page_size, 2 * D]``; a token's K is ``pool[p, 0, t, :D]`` and its V,
right behind it, ``pool[p, 0, t, D:]``. ``reference`` says the same in plain PyTorch.
With a ``page_format`` the pool is ``page_format.pool_shape`` instead: a page's numbers
lie in the same order, and behind them the scales of its keys and of its values.

No call waits for the GPU, and every grid depends on shapes (and ``max_query_len``)
alone: CUDA graphs can capture them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from kvserve.kernels.page_formats import PageFormat
from kvserve.kernels.score_form import RowScores
from kvserve.kernels.triton_attention import join_kernel, split_kernel, tile_kernel
from kvserve.kernels.triton_mass import mass_kernel
from kvserve.kernels.triton_pages import Pages
from kvserve.kernels.triton_scores import LOG2_E, Scores

# A split below this many keys does not pay for joining it.
MIN_SPLIT_TOKENS = 512
# Programs for splits beyond one a row: several waves on the largest GPUs, so that the
# last wave is a small part, and few enough that idle ones cost little.
SPLIT_PROGRAMS = 2048
# Bounds the idle programs of a small batch under a wide page table.
SPLIT_PROGRAMS_PER_ROW = 64
KEYS_AT_ONCE = 256


@dataclass(frozen=True)
class Mass:
    """Where decode adds up the attention that cached tokens draw.

    Attributes:
        drawn: ``[num_pages, page_size]`` float32; probabilities, summed over the ``G``
            heads of each row of one query, are added in place.
        scores: ``[num_pages, page_size, G]`` float32, for the kernels to work in.
    """

    drawn: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: ``block_m`` (query, head) pairs, ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Rows:
    """Rows as kernels read them; fields as the arguments of ``row_attention``."""

    query_start: Tensor
    seq_lens: Tensor
    page_table: Tensor
    gaps: Tensor | None

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """What kernels take; where there are no gaps, anything."""
        gaps = self.query_start if self.gaps is None else self.gaps
        return self.query_start, self.seq_lens, self.page_table, gaps

    @property
    def constants(self) -> dict[str, bool]:
        """What kernels are compiled for."""
        return {"GAPS": self.gaps is not None}


def row_attention(
    query: Tensor,
    pool: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    max_query_len: int,
    mass: Mass | None = None,
    page_format: PageFormat | None = None,
    scores: RowScores | None = None,
    gaps: Tensor | None = None,
) -> None:
    """Causal attention of every row's queries over its own pages, into ``out``.

    Row ``r`` owns ``query[query_start[r] : query_start[r + 1]]``, the LAST tokens of
    its sequence: of ``q_len`` queries, query ``i`` sees keys
    ``j <= seq_lens[r] - q_len + i``. A query that sees none gets zeros, a row without
    queries costs next to nothing. Accumulates in float32.

    Args:
        query: ``[n, G, D]`` contiguous, bfloat16, float16 or float32.
        pool: ``[num_pages, 1, page_size, 2 * D]`` contiguous, of query's type, or as
            ``page_format`` says.
        query_start: ``[rows + 1]`` int32; queries past its last entry are left alone.
        seq_lens: ``[rows]`` int32.
        page_table: ``[rows, W]`` int32; key ``j`` of row ``r`` is at offset
            ``j % page_size`` of page ``page_table[r, j // page_size]``. Entries past a
            row's last page are never read.
        out: ``[n, G, D]`` contiguous, of query's type.
        max_query_len: an upper bound of every row's queries; 1 means decode alone.
        mass: where to add what the tokens of rows of one query draw, if anywhere.
        page_format: what pages hold; ``None``: query's type.
        scores: how the model scores, and which heads and tokens rows are of.
        gaps: keys ``gap[0] .. gap[1] - 1`` of each row, which count in ``seq_lens`` but
            no query sees, ``[rows, 2]`` int32, contiguous. Their values must be finite.

    Raises:
        ValueError: scores are of other heads, or slopes have no positions.
    """
    pages = Pages.of(pool, page_format, query)
    _check(query, out, page_table, gaps)
    if seq_lens.numel() == 0 or query.numel() == 0:
        return
    rows = _Rows(query_start, seq_lens, page_table, gaps)
    slots = pool.shape[0], pool.shape[2]
    form = Scores.of(scores, query.shape[1], slots, query_start)
    _attend_single(query, pages, rows, scale, out, form, mass)
    if max_query_len > 1:
        _attend_many(query, pages, rows, scale, out, form, max_query_len)


def _check(query: Tensor, out: Tensor, page_table: Tensor, gaps: Tensor | None) -> None:
    assert query.dtype == out.dtype
    assert query.is_contiguous()
    assert out.is_contiguous()
    assert query.shape == out.shape
    assert page_table.stride(1) == 1
    if gaps is not None:
        assert gaps.shape == (len(page_table), 2)
        assert gaps.dtype == torch.int32
        assert gaps.is_contiguous()


def _attend_single(
    query: Tensor,
    pages: Pages,
    of: _Rows,
    scale: float,
    out: Tensor,
    form: Scores,
    mass: Mass | None,
) -> None:
    """The rows of one query; arguments as in ``row_attention``."""
    rows, width = of.page_table.shape
    stride = of.page_table.stride(0)
    group, head_size = query.shape[1:]
    tile = single_query_tile(query)
    longest = width * pages.page_size
    extra = min(
        SPLIT_PROGRAMS,
        rows * min(SPLIT_PROGRAMS_PER_ROW, longest // MIN_SPLIT_TOKENS),
    )
    programs = rows + extra
    partial = query.new_empty(programs, group, head_size, dtype=torch.float32)
    partial_softmax = query.new_empty(programs, group, 2, dtype=torch.float32)
    row_splits = query.new_empty(rows, 2, dtype=torch.int32)
    row_softmax = query.new_empty(rows, group, 2, dtype=torch.float32)
    scores = row_softmax if mass is None else mass.scores
    launch = _launch(query, tile)
    emit, least = mass is not None, MIN_SPLIT_TOKENS // tile.block_n
    split_kernel[(programs,)](
        query, pages.numbers, pages.scales, *of.arrays, out,
        partial, partial_softmax, row_splits, scores, row_softmax,
        *form.arrays, *form.numbers,
        scale * LOG2_E, rows, programs, stride,
        G=group, **pages.constants, **launch, MIN_BLOCKS=least, EMIT=emit,
        **form.constants, **of.constants,
    )  # fmt: skip
    if extra:
        join_kernel[(rows, group)](
            of.query_start, out, partial, partial_softmax, row_splits, row_softmax,
            G=group, HEAD_SIZE=head_size, HEAD_PAD=pages.constants["HEAD_PAD"],
            SPLITS_AT_ONCE=32, EMIT=emit,
        )  # fmt: skip
    if mass is not None:
        mass_kernel[(programs,)](
            *of.arrays[:3], mass.scores, row_softmax, mass.drawn,
            rows, programs, stride,
            G=group, G_PAD=triton.next_power_of_2(group), PAGE_SIZE=pages.page_size,
            BLOCK_N=tile.block_n, MIN_BLOCKS=least, KEYS_AT_ONCE=KEYS_AT_ONCE,
        )  # fmt: skip


def _attend_many(
    query: Tensor,
    pages: Pages,
    of: _Rows,
    scale: float,
    out: Tensor,
    form: Scores,
    max_query_len: int,
) -> None:
    """The rows of two queries and more; arguments as in ``row_attention``."""
    rows = len(of.seq_lens)
    tile = many_queries_tile(query, max_query_len, bool(pages.constants["SCALED"]))
    # A bound: a row has at most one tile that is not full.
    tiles = query.shape[0] // (tile.block_m // query.shape[1]) + rows
    tile_kernel[(tiles,)](
        query, pages.numbers, pages.scales, *of.arrays, out,
        *form.arrays, *form.numbers, scale * LOG2_E, rows, of.page_table.stride(0),
        G=query.shape[1], **pages.constants, **_launch(query, tile),
        **form.constants, **of.constants,
    )  # fmt: skip


def single_query_tile(query: Tensor) -> Tile:
    """Few accumulators, so that several programs a multiprocessor keep loads going."""
    block_m = max(16, triton.next_power_of_2(query.shape[1]))  # the least of tl.dot
    bytes_per_token = 2 * triton.next_power_of_2(query.shape[2]) * query.element_size()
    # 16 KiB a stage: five programs a multiprocessor on an H100, two on an L4.
    block_n = max(16, min(64, 16384 // bytes_per_token))
    return Tile(block_m, block_n, num_warps=4, num_stages=3)


def many_queries_tile(query: Tensor, max_query_len: int, is_scaled: bool) -> Tile:
    """The largest tiles whose operands fit the 99 KiB of the smaller GPUs.

    Bytes widened on their way to the tensor cores take registers of their own.
    """
    group, head_pad = query.shape[1], triton.next_power_of_2(query.shape[2])
    least = triton.next_power_of_2(group)
    pairs = triton.next_power_of_2(max_query_len * group)
    if query.dtype == torch.float32:
        return Tile(max(16, least), 32, num_warps=4, num_stages=1)
    if head_pad > 128:
        return Tile(max(64, least), 32, num_warps=4, num_stages=2)
    block_m = max(least, min(128, max(64, pairs)))
    block_n = 32 if is_scaled else 64
    return Tile(block_m, block_n, num_warps=block_m // 16, num_stages=2)


def _launch(query: Tensor, tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        # Triton's default rounds float32 operands to tf32.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
