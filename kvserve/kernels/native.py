# SPDX-License-Identifier: Apache-2.0
"""Kernels of a CPU, in C++.

Where there is no compiler, ``statistics`` stands in, and vLLM's attention.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvserve.kernels import statistics
from kvserve.kernels.compiling import FOLDER, compiled, reason
from kvserve.kernels.native_scores import Scores, places_of, scores_of
from kvserve.kernels.score_form import Positions, ScoreForm
from kvserve.kernels.statistics import CachedRows

WIDTH_STEP = 32
"""Head sizes and pages that fill whole vectors, two at a time, on every CPU."""
_MODEL_TYPES = (torch.float32, torch.bfloat16)
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3}
"""``pages.h``'s ``Kind`` of what a pool's pages hold; bytes are those of e4m3."""
_SCALED = (torch.uint8, torch.int8)
_SCALE_BYTES = 8
"""What a scaled page has beside a token's numbers: a scale of its key and value."""


def can_attend(dtype: torch.dtype, head_size: int, page_size: int) -> bool:
    """Tell whether the two kernels of attention take such queries, and their pages."""
    fits = head_size % WIDTH_STEP == page_size % WIDTH_STEP == 0
    return fits and dtype in _MODEL_TYPES and library() is not None


def write_pages(key: Tensor, value: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Store keys and values, rounded and scaled as the pool's type asks for.

    Args:
        key, value: ``[n, d]``, contiguous, float32 or bfloat16.
        pool: as of :func:`decode_attention`.
        slots: ``[n]`` int64.
    """
    check_tokens(key, value, pool, slots)
    sizes = pool.shape[2], key.shape[1], _is_half(key)
    keys, values = key.contiguous(), value.contiguous()
    _call(
        "write_pages", slots, len(slots), _KINDS[pool.dtype], pool, *sizes, keys, values
    )


def check_tokens(key: Tensor, value: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Refuse tokens that would be written beside the pool, or beside their slots.

    Args:
        key, value, pool, slots: as of :func:`write_pages`.
    """
    tokens = len(slots), key.shape[-1]
    _require(key.shape == value.shape == tokens, "a key and a value for each slot")
    _require(key.dtype == value.dtype, "keys and values of one type")
    _require(slots.dtype == torch.int64, "slots in int64")
    _require(slots.is_contiguous(), "contiguous slots")
    _check_pool(pool, key.shape[1])


def _check_pool(pool: Tensor, width: int) -> None:
    """Refuse a pool whose pages are not of heads of ``width`` numbers."""
    scales = _SCALE_BYTES if pool.dtype in _SCALED else 0
    _require(pool.is_contiguous(), "a contiguous pool")
    _require(
        pool.ndim == 4 and pool.shape[1] == 1 and pool.shape[3] == 2 * width + scales,
        f"pages of heads of {width} numbers, not {tuple(pool.shape)}",
    )


def _check_rows(
    query: Tensor, out: Tensor, page_table: Tensor, *by_row: Tensor
) -> None:
    """Refuse rows that kernels would read or write beside what they are given."""
    _require(query.shape == out.shape, "an output for each query")
    _require(query.dtype == out.dtype, "queries and outputs of one type")
    _require(out.is_contiguous(), "contiguous outputs")
    _require(page_table.dtype == torch.int32, "a page table in int32")
    _require(page_table.stride(1) == 1, "page tables row by row")
    for each in by_row:
        _require(len(each) == len(page_table), "a page list for each row")
        _require(each.is_contiguous(), "contiguous rows")


def _require(fact: bool, what: str) -> None:
    """Raise where memory beside a tensor would be touched; no option leaves it out."""
    if not fact:
        raise ValueError(f"kvserve's kernels take {what}")


def decode_attention(
    query: Tensor,
    pool: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    form: ScoreForm | None = None,
    positions: Positions | None = None,
    gaps: Tensor | None = None,
) -> None:
    """Attention of one query per row over its own pages; sums are float32.

    Args:
        query: ``[rows, G, d]``, contiguous, float32 or bfloat16.
        pool: ``[num_pages, 1, page_size, w]``, pages as ``page_formats`` says: int8,
            uint8 for e4m3, or float32 or bfloat16, where ``w`` is ``2 * d``.
        lengths: keys of each row, ``[rows]``, int32; a row without any gets zeros.
        page_table: ``[rows, W]``, int32.
        out: ``[rows, G, d]``, contiguous, of the queries' type.
        form: how the model scores; rows are then ``(token, KV head)`` in this order.
        positions: of the tokens of ``rows`` and of the pool; slopes ask for them.
        gaps: keys ``gap[0] .. gap[1] - 1`` of each row, which count in ``lengths`` but
            no query sees, ``[rows, 2]`` int32, contiguous. Their values must be finite.
    """
    rows, group, width = query.shape
    _check_rows(query, out, page_table, query, lengths)
    _require(lengths.dtype == torch.int32, "lengths in int32")
    _check_pool(pool, width)
    scores = _row_scores(form, positions, _slots(pool), rows, group)
    _attention_function("decode")(
        page_table.data_ptr(),
        page_table.stride(0),
        lengths.data_ptr(),
        rows,
        _KINDS[pool.dtype],
        pool.data_ptr(),
        pool.shape[2],
        width,
        _is_half(query),
        query.data_ptr(),
        group,
        scale,
        out.data_ptr(),
        scores,
        _place_of(gaps, len(lengths)),
    )


def prefill_attention(
    query: Tensor,
    pool: Tensor,
    first: Tensor,
    counts: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    form: ScoreForm | None = None,
    positions: Positions | None = None,
    gaps: Tensor | None = None,
) -> None:
    """Causal attention of rows of many queries over their own pages; sums are float32.

    Args:
        query: ``[tokens, H_kv, G, d]``, a token's numbers contiguous, float32 or
            bfloat16.
        pool: as of :func:`decode_attention`.
        first: where each row's queries begin, ``token * H_kv + head``, ``[rows]``
            int64; a row's further queries are the same head's of the tokens behind.
        counts: queries of each row, ``[rows]`` int32.
        lengths: keys that each row's last query sees, ``[rows]`` int32; each query
            before sees one less.
        page_table: ``[rows, W]``, int32.
        out: ``[tokens, H_kv, G, d]``, contiguous, of the queries' type; what is in no
            row is left alone.
        form, positions, gaps: as of :func:`decode_attention`, of ``tokens``.
    """
    tokens, kv_heads, group, width = query.shape
    _check_rows(query, out, page_table, first, counts, lengths)
    _require(first.dtype == torch.int64, "first queries in int64")
    _require(counts.dtype == lengths.dtype == torch.int32, "lengths in int32")
    _require(query[0].is_contiguous(), "contiguous queries of a token")
    _check_pool(pool, width)
    places = places_of(form, positions, _slots(pool), tokens)
    scores = scores_of(form, kv_heads, kv_heads * group, places)
    _attention_function("prefill")(
        page_table.data_ptr(),
        page_table.stride(0),
        first.data_ptr(),
        counts.data_ptr(),
        lengths.data_ptr(),
        len(lengths),
        _KINDS[pool.dtype],
        pool.data_ptr(),
        pool.shape[2],
        width,
        _is_half(query),
        query.data_ptr(),
        query.stride(0),
        kv_heads,
        group,
        scale,
        out.data_ptr(),
        scores,
        _place_of(gaps, len(lengths)),
    )


def _row_scores(
    form: ScoreForm | None,
    positions: Positions | None,
    slots: tuple[int, int],
    rows: int,
    group: int,
) -> Scores | None:
    """Lay out a form for rows of one query, ``(token, KV head)``."""
    if not form:
        return None
    heads = form.kv_heads(group)
    _require(rows % heads == 0, "a row for each KV head")
    places = places_of(form, positions, slots, rows // heads)
    return scores_of(form, heads, heads * group, places)


def _place_of(gaps: Tensor | None, rows: int) -> int | None:
    """Return where a gap of each row lies, if there are any."""
    if gaps is None:
        return None
    _require(gaps.dtype == torch.int32, "gaps in int32")
    _require(gaps.shape == (rows, 2), "a gap for each row")
    _require(gaps.is_contiguous(), "contiguous gaps")
    return gaps.data_ptr()


def _slots(pool: Tensor) -> tuple[int, int]:
    return pool.shape[0], pool.shape[2]


@cache
def _attention_function(kind: str) -> Any:
    """Every layer of every step calls it: arguments must not cost more than work."""
    function = getattr(library(), f"{kind}_attention")
    array, number = ctypes.c_void_p, ctypes.c_int64
    # Arrays by row, and later sizes of the queries: as many of the one as of the other.
    count = {"decode": 1, "prefill": 3}[kind]
    function.argtypes = [array, number, *[array] * count, number]
    function.argtypes += [number, array, number, number]
    function.argtypes += [number, array, *[number] * count, ctypes.c_float, array]
    function.argtypes += [ctypes.POINTER(Scores), array]
    function.restype = None
    return function


def attention_mass(
    query: Tensor, key: Tensor, scale: float, form: ScoreForm | None = None
) -> Tensor:
    """As ``statistics.attention_mass``; products of bfloat16 are exact here too."""
    if library() is None:
        return statistics.attention_mass(query, key, scale, form)
    kv_heads, keys, width = key.shape
    assert width % 2 == 0
    if not query.dtype == key.dtype == torch.bfloat16:
        query, key = query.float(), key.float()
    query, key = query.contiguous(), key.contiguous()
    mass = torch.empty(kv_heads, keys)
    sizes = kv_heads, len(query) // kv_heads, query.shape[1], keys, width
    scores = scores_of(form, kv_heads, len(query))
    _call(f"attention_mass_{_name(key.dtype)}", query, key, mass, *sizes, scale, scores)
    return mass


def add_row_attention(
    query: Tensor,
    pool: Tensor,
    places: Tensor | None,
    cached: CachedRows,
    scale: float,
    mass: Tensor,
    form: ScoreForm | None = None,
    positions: Positions | None = None,
) -> None:
    """As ``statistics.add_row_attention``, on the pages themselves.

    Args:
        query: ``[R, G, d]``, float32 or bfloat16.
        pool: as of :func:`decode_attention`.
        places: Where the keys of a page have number ``d`` of token ``t``,
            ``[d, page_size]`` int32; ``None`` where they are ``[d, page_size]``.
    """
    rows, group, width = query.shape
    pages = _KINDS[pool.dtype], pool, places, width
    queries = _is_half(query), query.contiguous(), group
    scores = _row_scores(form, positions, (len(mass), mass.shape[1]), rows, group)
    _call("add_row_attention", *_rows(cached), *pages, *queries, scale, mass, scores)


def lightest_slots(
    cached: CachedRows,
    mass: Tensor,
    position: Tensor,
    own: Tensor,
    safe_from: Tensor,
    by_count: bool,
) -> Tensor:
    """As ``statistics.lightest_slots``."""
    token_state = mass, position, own, safe_from
    if library() is None:
        return statistics.lightest_slots(cached, *token_state, by_count)
    slots = torch.empty_like(cached.rows)
    _call("lightest_slots", *_rows(cached), *token_state, int(by_count), slots)
    return slots


def can_normalise(dtype: torch.dtype) -> bool:
    """Tell whether :func:`rms_norm` takes rows of this type."""
    return dtype in _MODEL_TYPES and library() is not None


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> Tensor:
    """Divide rows by their root mean square, rounding where PyTorch's operators do.

    Args:
        x: ``[..., d]``, contiguous, float32 or bfloat16.
        weight: ``[d]``, contiguous, of the same type.
        residual: of the shape of ``x``, contiguous: added first; it gets the sum.
    """
    width = x.shape[-1]
    _require(weight.shape == (width,), f"a norm of {width} with {weight.shape} weights")
    for rows in (x, weight) if residual is None else (x, weight, residual):
        _require(
            rows.is_contiguous() and rows.dtype == x.dtype, "norms of strided rows"
        )
    output, sizes = torch.empty_like(x), (x.numel() // width, width)
    _call(f"rms_norm_{_name(x.dtype)}", x, residual, weight, output, *sizes, epsilon)
    return output


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels; ``None``, and one line that says so, without."""
    compiler = os.environ.get("CXX", "c++")
    try:
        return ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            "kvserve: decode is up to half as fast, and policies that sum attention "
            f"read prompts a third slower, for {compiler} did not compile "
            f"{FOLDER.name}/*.cpp: install g++, or name a C++ compiler in CXX "
            f"({reason(error)})",
            file=sys.stderr,
        )
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_half(query: Tensor) -> int:
    assert query.dtype in _MODEL_TYPES
    return int(query.dtype == torch.bfloat16)


def _rows(cached: CachedRows) -> tuple[Tensor | int, ...]:
    """Spread out what C++ calls ``Rows``."""
    table = cached.page_table
    assert table.dtype == torch.int32
    assert table.stride(1) == 1
    rows = cached.rows
    return table, table.stride(0), cached.lengths, rows, len(rows), cached.page_size


def _call(name: str, *arguments: Tensor | int | float | Scores | None) -> None:
    getattr(library(), name)(*map(_as_c, arguments))


def _as_c(
    argument: Tensor | int | float | Scores | None,
) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, Scores):
        return ctypes.byref(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
