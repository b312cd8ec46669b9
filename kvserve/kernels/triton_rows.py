# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: N803
"""Writing, copying and attending to head pages on a GPU, in Triton.

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
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvserve.kernels.page_formats import LEAST_SCALE, PageFormat
from kvserve.kernels.triton_attention import join_kernel, split_kernel, tile_kernel
from kvserve.kernels.triton_mass import mass_kernel

LOG2_E = 1.4426950408889634
# A split below this many keys does not pay for joining it.
MIN_SPLIT_TOKENS = 512
# Programs for splits beyond one a row: several waves on the largest GPUs, so that the
# last wave is a small part, and few enough that idle ones cost little.
SPLIT_PROGRAMS = 2048
# Bounds the idle programs of a small batch under a wide page table.
SPLIT_PROGRAMS_PER_ROW = 64
WRITES_AT_ONCE = 16
COPY_AT_ONCE = 4096


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
    """
    pages = _Pages.of(pool, page_format, query)
    _check(query, out, page_table)
    if seq_lens.numel() == 0 or query.numel() == 0:
        return
    rows = (query_start, seq_lens, page_table)
    _attend_single(query, pages, *rows, scale, out, mass)
    if max_query_len > 1:
        _attend_many(query, pages, *rows, scale, out, max_query_len)


@dataclass(frozen=True)
class _Pages:
    """A pool as kernels read it.

    Attributes:
        numbers: the pool, of the type of its numbers.
        scales: the same memory in float32, where pages have scales.
        page_size: tokens of a page.
        constants: what kernels are compiled for.
    """

    numbers: Tensor
    scales: Tensor
    page_size: int
    constants: dict[str, int]

    @classmethod
    def of(cls, pool: Tensor, page_format: PageFormat | None, like: Tensor) -> _Pages:
        """Check that ``pool`` holds heads of ``like [..., D]``, and name its parts."""
        head_size = like.shape[-1]
        assert pool.is_contiguous()
        numbers = scales = pool
        if page_format is None:
            assert like.dtype == pool.dtype
            assert pool.shape[-1] == 2 * head_size
        else:
            shape = page_format.pool_shape(pool.shape[0], pool.shape[2], head_size)
            assert pool.dtype == page_format.pool
            assert pool.shape == shape
            numbers = pool.view(page_format.number)
            if page_format.is_scaled:
                scales = pool.view(torch.float32)
        constants = {
            "HEAD_SIZE": head_size,
            "HEAD_PAD": triton.next_power_of_2(head_size),
            "PAGE_SIZE": pool.shape[2],
            "PAGE_STRIDE": pool.shape[2] * pool.shape[3],
            "SCALED": int(page_format is not None and page_format.is_scaled),
        }
        return cls(numbers, scales, pool.shape[2], constants)


def _check(query: Tensor, out: Tensor, page_table: Tensor) -> None:
    assert query.dtype == out.dtype
    assert query.is_contiguous()
    assert out.is_contiguous()
    assert query.shape == out.shape
    assert page_table.stride(1) == 1


def _attend_single(
    query: Tensor,
    pages: _Pages,
    query_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    mass: Mass | None,
) -> None:
    """The rows of one query; arguments as in ``row_attention``."""
    rows, width = page_table.shape
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
        query, pages.numbers, pages.scales, query_start, seq_lens, page_table, out,
        partial, partial_softmax, row_splits, scores, row_softmax,
        scale * LOG2_E, rows, programs, page_table.stride(0),
        G=group, **pages.constants, **launch, MIN_BLOCKS=least, EMIT=emit,
    )  # fmt: skip
    if extra:
        join_kernel[(rows, group)](
            query_start, out, partial, partial_softmax, row_splits, row_softmax,
            G=group, HEAD_SIZE=head_size, HEAD_PAD=pages.constants["HEAD_PAD"],
            SPLITS_AT_ONCE=32, EMIT=emit,
        )  # fmt: skip
    if mass is not None:
        mass_kernel[(programs,)](
            query_start, seq_lens, page_table, mass.scores, row_softmax, mass.drawn,
            rows, programs, page_table.stride(0),
            G=group, G_PAD=triton.next_power_of_2(group), PAGE_SIZE=pages.page_size,
            BLOCK_N=tile.block_n, MIN_BLOCKS=least, KEYS_AT_ONCE=KEYS_AT_ONCE,
        )  # fmt: skip


def _attend_many(
    query: Tensor,
    pages: _Pages,
    query_start: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    max_query_len: int,
) -> None:
    """The rows of two queries and more; arguments as in ``row_attention``."""
    rows = seq_lens.shape[0]
    tile = many_queries_tile(query, max_query_len, bool(pages.constants["SCALED"]))
    # A bound: a row has at most one tile that is not full.
    tiles = query.shape[0] // (tile.block_m // query.shape[1]) + rows
    tile_kernel[(tiles,)](
        query, pages.numbers, pages.scales, query_start, seq_lens, page_table, out,
        scale * LOG2_E, rows, page_table.stride(0),
        G=query.shape[1], **pages.constants, **_launch(query, tile),
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


def write_rows(
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slots: Tensor,
    page_format: PageFormat | None = None,
) -> None:
    """Scatter the K and V of ``n`` (token, KV head) pairs into their slots.

    Args:
        key, value: ``[n, D]`` of the pool's type, or of any if there is a
            ``page_format``; vectors contiguous, any row stride.
        pool: ``[num_pages, 1, page_size, 2 * D]`` contiguous, or as ``page_format``
            says; written in place.
        slots: ``[n]`` int64, ``page * page_size + offset``; a negative one is skipped.
        page_format: how numbers are stored; ``None``: as they are.
    """
    pages = _Pages.of(pool, page_format, key)
    assert key.dtype == value.dtype
    assert key.shape == value.shape
    assert len(slots) >= len(key)
    assert key.stride(1) == value.stride(1) == slots.stride(0) == 1
    n = len(key)
    if n == 0:
        return
    if not pages.constants["SCALED"]:
        key, value = key.to(pool.dtype), value.to(pool.dtype)
    _write_kernel[(triton.cdiv(n, WRITES_AT_ONCE),)](
        key, value, pages.numbers, pages.scales, slots,
        n, key.stride(0), value.stride(0), **pages.constants,
        GREATEST=page_format.greatest if page_format else 0.0, LEAST_SCALE=LEAST_SCALE,
        AT_ONCE=WRITES_AT_ONCE,
    )  # fmt: skip


@triton.jit
def _store_token(  # type: ignore[no-untyped-def]
    token,
    numbers,
    scales,
    wanted,
    GREATEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    """Store ``token [n, HEAD_PAD]`` where ``wanted``, scaled if GREATEST is not 0.

    ``PageFormat.stored`` says the same.
    """
    if GREATEST == 0:
        tl.store(numbers, token, mask=wanted)
    else:
        kind: tl.constexpr = numbers.dtype.element_ty
        token = token.to(tl.float32)
        scale = tl.math.div_rn(tl.max(tl.abs(token), 1), GREATEST)
        scale = tl.maximum(scale, LEAST_SCALE)
        token = tl.math.div_rn(token, tl.broadcast_to(scale[:, None], token.shape))
        # Beside so large a number no more digits are left than are wanted, and ties go
        # to even: of int8 none behind the point, of e4m3 three behind the leading one.
        large = 12582912.0
        if kind == tl.float8e4nv:
            power = token.to(tl.int32, bitcast=True) & 0x7F800000
            power = tl.maximum(power.to(tl.float32, bitcast=True), 0.015625)
            large = power * 1572864.0  # below 2^-6 all have the same last digit
        token = (token + large) - large
        token = tl.minimum(tl.maximum(token, -GREATEST), GREATEST)
        tl.store(numbers, token.to(kind), mask=wanted)
        tl.store(scales, scale, mask=tl.max(wanted.to(tl.int32), 1) > 0)


@triton.jit(do_not_specialize=["n"])
def _write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    pool,
    scales,
    slots,
    n,
    key_stride,
    value_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    GREATEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The K and V of ``AT_ONCE`` (token, KV head) pairs."""
    pair = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    dim = tl.arange(0, HEAD_PAD)
    slot = tl.load(slots + pair, mask=pair < n, other=-1)
    wanted = (slot >= 0)[:, None] & (dim < HEAD_SIZE)[None, :]
    page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
    from_ = pair.to(tl.int64)[:, None]
    to = pool + (page * PAGE_STRIDE + place * (2 * HEAD_SIZE))[:, None] + dim[None, :]
    own = scales
    if SCALED:
        own += page * (PAGE_STRIDE // 4) + PAGE_SIZE * 2 * HEAD_SIZE // 4 + place
    k = tl.load(key + from_ * key_stride + dim[None, :], mask=wanted, other=0.0)
    v = tl.load(value + from_ * value_stride + dim[None, :], mask=wanted, other=0.0)
    _store_token(k, to, own, wanted, GREATEST, LEAST_SCALE)
    _store_token(v, to + HEAD_SIZE, own + PAGE_SIZE, wanted, GREATEST, LEAST_SCALE)


def copy_pages(pool: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy page ``source[i]`` to page ``target[i]``.

    Args:
        pool: ``[num_pages, 1, page_size, w]`` contiguous, written in place.
        source, target: ``[n]`` int64, with no page in common.
    """
    assert all(tensor.is_contiguous() for tensor in (pool, source, target))
    n, size = source.numel(), pool[0].numel()
    if n == 0:
        return
    _copy_kernel[(n, triton.cdiv(size, COPY_AT_ONCE))](
        pool, source, target, SIZE=size, AT_ONCE=COPY_AT_ONCE
    )


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    pool, source, target, SIZE: tl.constexpr, AT_ONCE: tl.constexpr
):
    """``AT_ONCE`` of a page's ``SIZE`` numbers."""
    from_ = tl.load(source + tl.program_id(0)) * SIZE
    to = tl.load(target + tl.program_id(0)) * SIZE
    number = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    page_part = tl.load(pool + from_ + number, mask=number < SIZE)
    tl.store(pool + to + number, page_part, mask=number < SIZE)
