# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806
"""The GPU programs of ``triton_rows.row_attention``.

Symbols: ``D`` head size, ``G`` query heads that share a KV head, ``W`` width of the
page table, ``n`` all queries of the call. The pool is contiguous
``[num_pages, 1, page_size, 2 * D]``; a token's K is ``pool[p, 0, t, :D]`` and its V,
right behind it, ``pool[p, 0, t, D:]``. ``reference`` says the same in plain PyTorch.
A page may hold other numbers than the query's, and then, at its end, a scale for each
token's K and V: see ``page_formats``.

Rows differ in length by orders of magnitude (a bounded head beside a full one), so no
grid here is rows x longest row. Two kernels share a call:

* rows of ONE query stream their keys once: bandwidth is all. Their keys are cut into
  splits of about equal size over the whole batch, a program each; short rows stay
  whole, long rows become many splits, whose results a second kernel joins;
* rows of more queries are cut into tiles of queries x G, a program each.

Decode may also emit what every cached token drew: the first kernel then leaves its
scores beside the pool, and once a row's softmax is whole, ``triton_mass`` turns them
into probabilities. Scores are ``G`` numbers a token where its key has ``D``.

Every program finds its own row from ``query_start`` and ``seq_lens``, so the grids
depend on shapes alone: nothing waits for the GPU, and CUDA graphs replay the launches.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kvserve.kernels.triton_scores import bent, start_of
from kvserve.kernels.triton_splits import find_split, find_tile, split_keys


@triton.jit
def _attend(
    query,
    first,
    last,
    seen,
    acc,
    peak,
    mass,
    pool,
    scales,
    pages,
    scores,
    scale,
    positions,
    cap,
    slope,
    position,
    window,
    gap,
    G: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPES: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAPS: tl.constexpr,
    MASKED: tl.constexpr,
    EMIT: tl.constexpr,
):
    """Add keys ``first .. last - 1`` to the online softmax of ``query [M, HEAD_PAD]``.

    ``first`` is a multiple of BLOCK_N. Unless MASKED, ``last`` is one too and every
    query sees every key; MASKED lets query m see keys ``j < seen[m]``. EMIT leaves the
    first G queries' scores at ``scores[slot, g]``. CAPPED, SLOPES and WINDOWED are of
    the form, see ``triton_scores``: ``slope`` and ``position`` are of each query. GAPS
    hides keys ``gap[0] .. gap[1] - 1`` from all of them.
    """
    dim = tl.arange(0, HEAD_PAD)
    head = tl.arange(0, query.shape[0])
    lane = tl.arange(0, BLOCK_N)
    if GAPS:
        gap_first = tl.load(gap)
        gap_last = tl.load(gap + 1)
    # A block's pages are looked up one block ahead, or each load of keys would wait
    # for another load.
    page = tl.load(pages + (first + lane) // PAGE_SIZE, first + lane < last, other=0)
    for start in range(first, last, BLOCK_N):
        token = start + lane
        ahead = token + BLOCK_N
        next_page = tl.load(pages + ahead // PAGE_SIZE, mask=ahead < last, other=0)
        place = token % PAGE_SIZE
        number = page.to(tl.int64) * PAGE_STRIDE + place * (2 * HEAD_SIZE)
        here = pool + number[:, None] + dim[None, :]
        if MASKED or HEAD_PAD != HEAD_SIZE:
            # V past the end must be 0, not what the page holds: 0 x NaN is NaN.
            wanted = (token < last)[:, None] & (dim < HEAD_SIZE)[None, :]
            key = tl.load(here, mask=wanted, other=0.0)
            value = tl.load(here + HEAD_SIZE, mask=wanted, other=0.0)
        else:
            key = tl.load(here)
            value = tl.load(here + HEAD_SIZE)
        # Exact: no type of a page says more than the query's.
        key = key.to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if SCALED:
            own = page.to(tl.int64) * (PAGE_STRIDE // 4) + place
            own += PAGE_SIZE * 2 * HEAD_SIZE // 4
            key_scale = tl.load(scales + own, mask=token < last, other=0.0)
            value_scale = tl.load(scales + own + PAGE_SIZE, token < last, other=0.0)
            score *= key_scale[None, :]
        slot = page.to(tl.int64) * PAGE_SIZE + place
        score = bent(
            score, slot, token < last, positions, cap, slope, position, CAPPED, SLOPES
        )
        if MASKED:
            score = tl.where(token[None, :] < seen[:, None], score, float("-inf"))
        if WINDOWED:
            hidden = token[None, :] < seen[:, None] - window
            score = tl.where(hidden, float("-inf"), score)
        if GAPS:
            in_gap = (token >= gap_first) & (token < gap_last)
            score = tl.where(in_gap[None, :], float("-inf"), score)
        if EMIT:
            emitted = (head < G)[:, None] & (token < last)[None, :]
            tl.store(scores + slot[None, :] * G + head[:, None], score, mask=emitted)
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A query that has seen nothing yet: -inf minus -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(peak - base)
        mass = mass * fade + tl.sum(weight, 1)
        if SCALED:
            weight *= value_scale[None, :]
        acc = tl.dot(
            weight.to(query.dtype),
            value.to(query.dtype),
            acc * fade[:, None],
            input_precision=PRECISION,
        )
        peak = new_peak
        page = next_page
    return acc, peak, mass


@triton.jit(do_not_specialize=["rows", "programs", "table_stride"])
def split_kernel(
    query,
    pool,
    scales,
    query_start,
    seq_lens,
    page_table,
    gaps,
    out,
    partial,
    partial_softmax,
    row_splits,
    scores,
    row_softmax,
    sinks,
    slopes,
    positions,
    own,
    row_first,
    cap,
    heads,
    window,
    scale,
    rows,
    programs,
    table_stride,
    G: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAPS: tl.constexpr,
    EMIT: tl.constexpr,
):
    """One split of a row with one query: its output, or its share for join_kernel."""
    program = tl.program_id(0)
    row, split, splits = find_split(
        program, query_start, seq_lens, rows, programs, BLOCK_N, MIN_BLOCKS
    )
    if row >= rows:
        return
    seq_len = tl.load(seq_lens + row)
    first, last = split_keys(split, splits, seq_len, BLOCK_N)
    whole = last // BLOCK_N * BLOCK_N

    head = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_PAD)
    at = head[:, None] * HEAD_SIZE + dim[None, :]
    wanted = (head < G)[:, None] & (dim < HEAD_SIZE)[None, :]
    begin = tl.load(query_start + row).to(tl.int64) * (G * HEAD_SIZE)
    q = tl.load(query + begin + at, mask=wanted, other=0.0)

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    peak, mass, slope, position = start_of(
        sinks, slopes, own, row_first, heads, row, head * 0, head, head < G,
        G, SINKS, SLOPES,
    )  # fmt: skip
    if SINKS:
        # A row has its sinks once, however many splits it has.
        peak = tl.where(split == 0, peak, float("-inf"))
        mass = tl.where(split == 0, mass, 0.0)
    seen = tl.zeros([BLOCK_M], tl.int32) + seq_len
    pages = page_table + row.to(tl.int64) * table_stride
    acc, peak, mass = _attend(
        q, first, whole, seen, acc, peak, mass, pool, scales, pages, scores, scale,
        positions, cap, slope, position, window, gaps + row * 2,
        G, HEAD_SIZE, HEAD_PAD, PAGE_SIZE, PAGE_STRIDE, SCALED, BLOCK_N,
        PRECISION, CAPPED, SLOPES, WINDOWED, GAPS, False, EMIT,
    )  # fmt: skip
    acc, peak, mass = _attend(
        q, whole, last, seen, acc, peak, mass, pool, scales, pages, scores, scale,
        positions, cap, slope, position, window, gaps + row * 2,
        G, HEAD_SIZE, HEAD_PAD, PAGE_SIZE, PAGE_STRIDE, SCALED, BLOCK_N,
        PRECISION, CAPPED, SLOPES, WINDOWED, GAPS, True, EMIT,
    )  # fmt: skip

    if splits == 1:
        result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(out + begin + at, result.to(out.dtype.element_ty), mask=wanted)
        if EMIT:
            tl.store(row_softmax + (row * G + head) * 2, peak, head < G)
            tl.store(row_softmax + (row * G + head) * 2 + 1, mass, head < G)
    else:
        tl.store(partial + program.to(tl.int64) * (G * HEAD_SIZE) + at, acc, wanted)
        tl.store(partial_softmax + (program * G + head) * 2, peak, head < G)
        tl.store(partial_softmax + (program * G + head) * 2 + 1, mass, head < G)
    if split == 0:
        tl.store(row_splits + row * 2, program)
        tl.store(row_splits + row * 2 + 1, splits)


@triton.jit
def join_kernel(
    query_start,
    out,
    partial,
    partial_softmax,
    row_splits,
    row_softmax,
    G: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    EMIT: tl.constexpr,
):
    """Join the splits of one (row, query head); rows of one split are done already."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - begin != 1:
        return
    first = tl.load(row_splits + row * 2)
    splits = tl.load(row_splits + row * 2 + 1)
    if splits == 1:
        return
    dim = tl.arange(0, HEAD_PAD)
    acc = tl.zeros([HEAD_PAD], tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    for base in range(0, splits, SPLITS_AT_ONCE):
        split = base + tl.arange(0, SPLITS_AT_ONCE)
        inside = split < splits
        at = ((first + split) * G + head).to(tl.int64)
        peaks = tl.load(partial_softmax + at * 2, mask=inside, other=float("-inf"))
        masses = tl.load(partial_softmax + at * 2 + 1, mask=inside, other=0.0)
        wanted = inside[:, None] & (dim < HEAD_SIZE)[None, :]
        part = tl.load(
            partial + at[:, None] * HEAD_SIZE + dim[None, :], mask=wanted, other=0.0
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        # Splits that lie before the row's window, or in its gap, have seen nothing.
        base_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(peaks - base_peak)
        fade = tl.exp2(peak - base_peak)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        mass = mass * fade + tl.sum(masses * weight, 0)
        peak = new_peak
    where = out + (begin.to(tl.int64) * G + head) * HEAD_SIZE + dim
    result = acc / tl.where(mass == 0.0, 1.0, mass)
    tl.store(where, result.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)
    if EMIT:
        tl.store(row_softmax + (row * G + head) * 2, peak)
        tl.store(row_softmax + (row * G + head) * 2 + 1, mass)


@triton.jit(do_not_specialize=["rows", "table_stride"])
def tile_kernel(
    query,
    pool,
    scales,
    query_start,
    seq_lens,
    page_table,
    gaps,
    out,
    sinks,
    slopes,
    positions,
    own,
    row_first,
    cap,
    heads,
    window,
    scale,
    rows,
    table_stride,
    G: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAPS: tl.constexpr,
):
    """One tile (BLOCK_M // G queries x G heads) of a row with several queries."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    row, tile = find_tile(tl.program_id(0), query_start, rows, BLOCK_Q)
    begin = tl.load(query_start + row)
    q_len = tl.load(query_start + row + 1) - begin
    tiles = tl.cdiv(q_len, BLOCK_Q)
    if (q_len <= 1) | (tile >= tiles):
        return
    # The last tile sees the most keys: start it first.
    first_query = (tiles - 1 - tile) * BLOCK_Q

    pair = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_PAD)
    index = first_query + pair // G
    wanted = (pair < BLOCK_Q * G) & (index < q_len)
    at = (begin.to(tl.int64) + first_query) * (G * HEAD_SIZE)
    at += pair[:, None] * HEAD_SIZE + dim[None, :]
    inside = wanted[:, None] & (dim < HEAD_SIZE)[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)

    seq_len = tl.load(seq_lens + row)
    # Keys that query 0 of the row sees, without itself: negative if it sees none.
    context = seq_len - q_len
    seen = tl.where(wanted, context + index + 1, 0)
    last = tl.maximum(tl.minimum(context + first_query + BLOCK_Q, seq_len), 0)
    whole = tl.maximum(context + first_query + 1, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    peak, mass, slope, position = start_of(
        sinks, slopes, own, row_first, heads, row, index, pair % G, wanted,
        G, SINKS, SLOPES,
    )  # fmt: skip
    pages = page_table + row.to(tl.int64) * table_stride
    acc, peak, mass = _attend(
        q, 0, whole, seen, acc, peak, mass, pool, scales, pages, pool, scale,
        positions, cap, slope, position, window, gaps + row * 2,
        G, HEAD_SIZE, HEAD_PAD, PAGE_SIZE, PAGE_STRIDE, SCALED, BLOCK_N,
        PRECISION, CAPPED, SLOPES, WINDOWED, GAPS, False, False,
    )  # fmt: skip
    acc, peak, mass = _attend(
        q, whole, last, seen, acc, peak, mass, pool, scales, pages, pool, scale,
        positions, cap, slope, position, window, gaps + row * 2,
        G, HEAD_SIZE, HEAD_PAD, PAGE_SIZE, PAGE_STRIDE, SCALED, BLOCK_N,
        PRECISION, CAPPED, SLOPES, WINDOWED, GAPS, True, False,
    )  # fmt: skip
    result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
