# SPDX-License-Identifier: Apache-2.0
"""Head pages on a CPU, behind the interface of ``device``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvserve.engine.batch.head_major import HeadMajor
from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.device import Device
from kvserve.kernels import native, statistics
from kvserve.kernels.score_form import Positions, ScoreForm
from kvserve.kernels.statistics import CachedRows

PAGE_SIZE = 32
"""Tokens of a head page: the smallest that vLLM's CPU kernels take."""


@dataclass(frozen=True)
class HalfLayout:
    """How one half of a page, its keys or its values, lies in memory.

    Attributes:
        order: Place of each number, token by token, ``[page_size * head_size]``.
        is_plain: They lie token by token.
        is_transposed: They lie dimension by dimension.
    """

    order: torch.Tensor
    is_plain: bool
    is_transposed: bool


@dataclass(frozen=True)
class PlannedRows:
    """A step's rows as a CPU's kernels want them, decode rows first.

    Attributes:
        decodes: leading rows that follow the tokens and have one query each.
        seq_lens: keys of each row, ``[rows]``, int32.
        first: where the queries of each row behind begin, as ``RowShapes.first``.
        counts: how many they are, int32.
        stock: what vLLM's kernel wants to know, where ours does not serve.
        gaps: keys that no query of a row sees, ``[rows, 2]`` int32, if any row has.
    """

    decodes: int
    seq_lens: torch.Tensor
    first: torch.Tensor
    counts: torch.Tensor
    stock: StockRows
    gaps: torch.Tensor | None = None


@dataclass(frozen=True)
class StockRows:
    """Rows as vLLM's kernel wants them, over queries that are head-major.

    Attributes:
        schedules: by the window of a layer, -1 without one.
    """

    query_start: torch.Tensor
    schedules: dict[int, torch.Tensor] = field(default_factory=dict)


class CPUDevice(Device):
    """Our own kernels, which read pages as vLLM's kernels lay them out on most CPUs.

    On others, for float16, or without a C++ compiler, vLLM's stock kernel serves,
    called with one KV head.
    """

    def __init__(
        self, dtype: torch.dtype, group_size: int, head_size: int, page_size: int
    ) -> None:
        self._dtype = dtype
        self._group_size = group_size
        self._head_size = head_size
        self._page_size = page_size
        self._isa = _get_attn_isa(dtype, page_size, head_size, "auto")
        # Asked for here, so that no request waits for a compiler.
        self._has_kernels = self._can_attend()

    def plan_rows(self, shapes: RowShapes) -> PlannedRows:
        seq_lens, decodes = torch.from_numpy(shapes.seq_lens), shapes.num_decodes
        counts = np.diff(shapes.query_start[decodes:])
        stock = StockRows(torch.from_numpy(shapes.query_start))
        first = torch.from_numpy(shapes.first[decodes:])
        gaps = None if shapes.gaps is None else torch.from_numpy(shapes.gaps)
        counted = torch.from_numpy(counts)
        return PlannedRows(decodes, seq_lens, first, counted, stock, gaps)

    def _can_attend(self) -> bool:
        """Tell whether our own kernels take these pages."""
        keys, values = self._layouts
        known = keys.is_transposed and values.is_plain
        sizes = self._head_size, self._page_size
        return known and native.can_attend(self._dtype, *sizes)

    def _schedule(
        self, query_start: torch.Tensor, seq_lens: torch.Tensor, window: int
    ) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self._group_size,
            num_kv_heads=1,
            head_dim=self._head_size,
            seq_lens=seq_lens,
            dtype=self._dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=window,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        native.check_tokens(key, value, pool, slots)
        keys, values = _split(pool)
        ops.cpu_attn_reshape_and_cache(
            key.unsqueeze(1), value.unsqueeze(1), keys, values, slots, self._isa
        )

    def prepare_statistics(self, pool: torch.Tensor) -> None:
        native.library()

    def attention_mass(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        form: ScoreForm | None = None,
    ) -> torch.Tensor:
        return native.attention_mass(query, key, scale, form)

    def add_row_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        cached: CachedRows,
        scale: float,
        mass: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        what = cached, scale, mass, form, positions
        if native.library() is None or pool.dtype == torch.float16:
            keys = self.read_keys(pool, cached.pages())
            statistics.add_row_attention(query, keys, *what)
        else:
            places = self._key_places
            native.add_row_attention(query, pool, places, *what)

    def lightest_slots(
        self,
        cached: CachedRows,
        mass: torch.Tensor,
        position: torch.Tensor,
        own: torch.Tensor,
        safe_from: torch.Tensor,
        by_count: bool,
    ) -> torch.Tensor:
        return native.lightest_slots(cached, mass, position, own, safe_from, by_count)

    @cached_property
    def _key_places(self) -> torch.Tensor | None:
        """Where a page has its keys, ``[head_size, page_size]``, unless just so."""
        keys = self._layouts[0]
        by_token = keys.order.view(self._page_size, self._head_size)
        return None if keys.is_transposed else by_token.T.int().contiguous()

    def _read(self, pool: torch.Tensor, pages: torch.Tensor, half: int) -> torch.Tensor:
        content = pool.view(len(pool), 2, -1)[:, half].index_select(0, pages.flatten())
        size, width = self._page_size, self._head_size
        layout = self._layouts[half]
        if layout.is_transposed:
            return content.view(*pages.shape, width, size).transpose(-1, -2)
        if not layout.is_plain:
            content = content[:, layout.order]
        return content.view(*pages.shape, size, width)

    @cached_property
    def _layouts(self) -> list[HalfLayout]:
        """How keys, and values, lie in their half of a page.

        Kernels lay them out as their instructions like them. What they do is found
        by writing numbered elements, one base-128 digit after the other, since every
        type holds those exactly.
        """
        size, width = self._page_size, self._head_size
        number = torch.arange(size * width).view(size, width)
        slots = torch.arange(size)
        found = torch.zeros(2, size * width, dtype=torch.long)
        for digit in range(4):
            pool = torch.zeros(1, 1, size, 2 * width, dtype=self._dtype)
            element = (number // 128**digit % 128).to(self._dtype)
            self.write(element, element, pool, slots)
            found += pool.view(2, -1).long() * 128**digit
        return [
            HalfLayout(
                order=half.argsort(),
                is_plain=torch.equal(half, number.flatten()),
                is_transposed=torch.equal(half, number.T.flatten()),
            )
            for half in found
        ]

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: Any,
        page_table: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        if not self._has_kernels:
            self._attend_stock(query, pool, rows, page_table, scale, out, form)
            return
        group, width = self._group_size, self._head_size
        decodes, lengths, gaps = rows.decodes, rows.seq_lens, rows.gaps
        scores = form, positions
        if decodes:
            tokens = decodes * group // query.shape[1]
            native.decode_attention(
                # With one KV head it is a view of what queries, keys and values share.
                query[:tokens].reshape(-1, group, width).contiguous(),
                pool,
                lengths[:decodes],
                page_table[:decodes],
                scale,
                out[:tokens].view(-1, group, width),
                *scores,
                None if gaps is None else gaps[:decodes],
            )
        if len(rows.counts):
            native.prefill_attention(
                query.view(len(query), -1, group, width),
                pool,
                rows.first,
                rows.counts,
                lengths[decodes:],
                page_table[decodes:],
                scale,
                out.view(len(query), -1, group, width),
                *scores,
                None if gaps is None else gaps[decodes:],
            )

    @property
    def supports_gaps(self) -> bool:
        return self._has_kernels

    def supports(self, form: ScoreForm) -> bool:
        # vLLM's kernel is called with one KV head, whose sinks and slopes would be
        # those of all; and it takes a key's place in its row for its position.
        by_head = form.sink_logits, form.alibi_slopes
        return self._has_kernels or all(each is None for each in by_head)

    def _attend_stock(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: PlannedRows,
        page_table: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        form: ScoreForm | None = None,
    ) -> None:
        if form and not self.supports(form):
            raise NotImplementedError("sinks or slopes in vLLM's kernel")
        if rows.gaps is not None:
            raise NotImplementedError("gaps in vLLM's kernel")
        window = form.window if form and form.window else -1
        schedules, query_start = rows.stock.schedules, rows.stock.query_start
        if window not in schedules:
            schedules[window] = self._schedule(query_start, rows.seq_lens, window)
        keys, values = _split(pool)
        order = HeadMajor(rows.decodes, self._group_size)
        query_rows = order.rows_of(query)
        output_rows = torch.empty_like(query_rows)
        ops.cpu_attention_with_kv_cache(
            query=query_rows,
            key_cache=keys,
            value_cache=values,
            output=output_rows,
            query_start_loc=rows.stock.query_start,
            seq_lens=rows.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=page_table,
            softcap=form.soft_cap if form else 0.0,
            scheduler_metadata=schedules[window],
            s_aux=None,
        )
        order.put_back(output_rows, out)


def _split(pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View a pool as the CPU kernels' key and value halves of each page."""
    pages, heads, page_size, width = pool.shape
    keys, values = pool.view(pages, heads, page_size * 2, width // 2).chunk(2, dim=2)
    return keys, values
