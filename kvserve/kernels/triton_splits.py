# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
"""Which part of which row a program of ``triton_attention`` works on."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# Rows that one program looks at together to find its own.
ROWS_AT_ONCE = tl.constexpr(1024)


@triton.jit
def _row_blocks(row, rows, query_start, seq_lens, BLOCK_N: tl.constexpr):
    """(has one query, blocks of keys) of each of ``row``; (False, 0) past the end."""
    inside = row < rows
    begin = tl.load(query_start + row, mask=inside, other=0)
    end = tl.load(query_start + row + 1, mask=inside, other=0)
    seq_len = tl.load(seq_lens + row, mask=inside, other=0)
    single = end - begin == 1
    return single, tl.where(single, tl.cdiv(seq_len, BLOCK_N), 0)


@triton.jit
def find_split(
    program,
    query_start,
    seq_lens,
    rows,
    programs,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
):
    """(row, split of the row, splits of the row); row is >= rows past the last split.

    At most ``programs - rows`` splits of at least MIN_BLOCKS come on top of one a row.
    """
    lane = tl.arange(0, ROWS_AT_ONCE)
    total = tl.zeros((), tl.int32)
    for base in range(0, rows, ROWS_AT_ONCE):
        _, blocks = _row_blocks(base + lane, rows, query_start, seq_lens, BLOCK_N)
        total += tl.sum(blocks)
    size = tl.maximum(MIN_BLOCKS, tl.cdiv(total, tl.maximum(programs - rows, 1)))

    row = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    next_first = tl.full((), 2147483647, tl.int32)
    taken = tl.zeros((), tl.int32)
    for base in range(0, rows, ROWS_AT_ONCE):
        single, blocks = _row_blocks(base + lane, rows, query_start, seq_lens, BLOCK_N)
        splits = tl.where(single, tl.maximum(1, (blocks + size // 2) // size), 0)
        ends = taken + tl.cumsum(splits, 0)
        row += tl.sum((ends <= program).to(tl.int32))
        first = tl.maximum(first, tl.max(tl.where(ends <= program, ends, 0)))
        after = tl.where(ends > program, ends, 2147483647)
        next_first = tl.minimum(next_first, tl.min(after))
        taken += tl.sum(splits)
    return row, program - first, next_first - first


@triton.jit
def split_keys(split, splits, seq_len, BLOCK_N: tl.constexpr):
    """(first, last) key of a split, the last exclusive; the first at a block's edge."""
    blocks = tl.cdiv(seq_len, BLOCK_N)
    first = split * blocks // splits * BLOCK_N
    return first, tl.minimum((split + 1) * blocks // splits * BLOCK_N, seq_len)


@triton.jit
def find_tile(program, query_start, rows, BLOCK_Q: tl.constexpr):
    """(row, tile of the row). Row k's tiles begin at ``query_start[k] // BLOCK_Q + k``:
    enough room for all of them, and no sum over the rows before it is needed."""
    row = tl.full((), -1, tl.int32)
    for base in range(0, rows, ROWS_AT_ONCE):
        other = base + tl.arange(0, ROWS_AT_ONCE)
        begin = tl.load(query_start + other, mask=other < rows, other=0)
        before = (begin // BLOCK_Q + other <= program) & (other < rows)
        row += tl.sum(before.to(tl.int32))
    return row, program - (tl.load(query_start + row) // BLOCK_Q + row)
