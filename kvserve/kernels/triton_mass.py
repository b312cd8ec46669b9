# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
"""What cached tokens draw, from the scores that ``triton_attention`` left."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kvserve.kernels.triton_splits import find_split, split_keys


@triton.jit(do_not_specialize=["rows", "programs", "table_stride"])
def mass_kernel(
    query_start,
    seq_lens,
    page_table,
    scores,
    row_softmax,
    drawn,
    rows,
    programs,
    table_stride,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    KEYS_AT_ONCE: tl.constexpr,
):
    """Add what the tokens of one split of split_kernel drew to ``drawn``."""
    row, split, splits = find_split(
        tl.program_id(0), query_start, seq_lens, rows, programs, BLOCK_N, MIN_BLOCKS
    )
    if row >= rows:
        return
    seq_len = tl.load(seq_lens + row)
    first, last = split_keys(split, splits, seq_len, BLOCK_N)
    head = tl.arange(0, G_PAD)
    at = (row * G + head) * 2
    peak = tl.load(row_softmax + at, mask=head < G, other=0.0)
    mass = tl.load(row_softmax + at + 1, mask=head < G, other=1.0)
    # A row that sees nothing but a gap: its scores are -inf, as its peak is.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.where(mass == 0.0, 1.0, mass)
    pages = page_table + row.to(tl.int64) * table_stride
    for start in range(first, last, KEYS_AT_ONCE):
        token = start + tl.arange(0, KEYS_AT_ONCE)
        inside = token < last
        page = tl.load(pages + token // PAGE_SIZE, mask=inside, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
        wanted = inside[:, None] & (head < G)[None, :]
        score = tl.load(
            scores + slot[:, None] * G + head[None, :], wanted, other=float("-inf")
        )
        share = tl.sum(tl.exp2(score - peak[None, :]) / mass[None, :], 1)
        # A slot belongs to one row, and a row's split to one program.
        before = tl.load(drawn + slot, mask=inside, other=0.0)
        tl.store(drawn + slot, before + share, mask=inside)
