# SPDX-License-Identifier: Apache-2.0
"""Turn a scheduled batch into rows for a paged-attention kernel.

A *row* is a sequence of queries that share one KV head and one page table: a (request,
KV head) pair in decode and for full heads, a (request, KV head, query block) triple
for bounded heads in prefill; which heads are bounded may differ among requests.
Kernels run rows with ``num_kv_heads = 1`` and know nothing of policies: what a head
may see is which pages its rows list.

Rows of a step come in two parts. Decode rows follow the tokens, ``(request, head)``,
so that queries ``[tokens, H_q, D]`` are rows by a mere view. Prefill rows are
head-major, ``(head, request[, block])``, over queries transposed to
``[H_kv, tokens, G, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvserve.engine.batch.page_tables import PageTables
from kvserve.plan.lanes import BoolArray, IntArray, PageArray
from kvserve.plan.page_plan import PagePlan

Int32Array = npt.NDArray[np.int32]
Layers = IntArray | list[IntArray]
"""Of each layer ``[num_layers, n]``; a list if layers have unequal heads."""


@dataclass
class RowShapes:
    """Lengths of a step's rows, shared by all layers whose heads have equal budgets.

    Attributes:
        num_decodes: leading rows that follow the tokens.
        query_start: first query of each row, ``[rows + 1]``, where the rows behind are
            head-major.
        seq_lens: keys that the row's last query sees, ``[rows]``.
        first: the same first queries as ``token * H_kv + head``, ``[rows]``.
        gaps: keys ``gap[0] .. gap[1] - 1`` of each row, which count in ``seq_lens`` but
            no query sees, ``[rows, 2]``; equal ends are no gap. ``None``: no row has.
    """

    num_decodes: int
    query_start: Int32Array
    seq_lens: Int32Array
    first: IntArray
    gaps: Int32Array | None = None


@dataclass
class StepRows:
    """One step's rows.

    Attributes:
        num_decode_tokens: leading tokens that are decode rows.
        shapes: the distinct lengths among the layers.
        shape_of_layer: which of ``shapes`` is a layer's, ``[num_layers]``.
        page_tables: pages of each layer's rows, ``[num_layers]`` of ``[rows, width]``.
        slots: where each token's key and value go, ``[num_layers, tokens * H_kv]``,
            or of each layer if they have unequal heads.
        copies: per layer, scratch pages and the ring pages they replace once attention
            is done; empty when there is nothing to copy.
    """

    num_decode_tokens: int
    shapes: list[RowShapes]
    shape_of_layer: list[int]
    page_tables: PageArray | list[PageArray]
    slots: IntArray | list[IntArray]
    copies: list[tuple[IntArray, IntArray]] = field(default_factory=list)


class RowBuilder:
    """Builds the rows of each step from the page tables."""

    def __init__(self, plan: PagePlan, tables: PageTables) -> None:
        self._plan = plan
        self._tables = tables
        self._layout = plan.layout

    def build(self, query_start: IntArray, seq_lens: IntArray) -> StepRows:
        """Build the rows of a batch whose one-token requests come first.

        Args:
            query_start: first token of each request, ``[requests + 1]``.
            seq_lens: tokens of each request when the step is done, ``[requests]``.
        """
        lengths = np.diff(query_start)
        longer = np.flatnonzero(lengths > 1)
        num_decodes = int(longer[0]) if longer.size else len(lengths)
        decodes = seq_lens[:num_decodes]
        decode_lens = self._of_heads(self._tables.tokens_seen(decodes))
        decode_gaps = self._gaps_of_decodes(decodes)
        slots = self._slots_of_heads(self._tables.next_slots(decodes))
        if not longer.size:
            return self._decode_only(num_decodes, decode_lens, decode_gaps, slots)
        chunks = _Chunks(self._plan, self._tables, query_start, seq_lens, num_decodes)
        slots = _joined(slots, self._slots_of_heads(chunks.slots()))
        row_lengths = _joined(chunks.row_lengths(), decode_lens)
        if self._layout:  # rows of as many lanes may be of more heads
            heads = np.array([[one.kv_heads] for one in self._layout])
            row_lengths = _joined(heads, row_lengths)
        row_lengths = _joined(row_lengths, decode_gaps)
        exemplars, shape_of_layer = _alike_layers(row_lengths)
        shapes = [
            self._with_prefill(decode_lens[layer], decode_gaps[layer], chunks, layer)
            for layer in exemplars
        ]
        return StepRows(
            num_decodes,
            shapes,
            shape_of_layer,
            self._page_tables(self._decode_tables(num_decodes), chunks),
            slots,
            chunks.copies(),
        )

    def _decode_only(
        self, num_decodes: int, decode_lens: Layers, gaps: IntArray, slots: Layers
    ) -> StepRows:
        # Lanes of unequal budgets are alike until the smaller one is full.
        exemplars, shape_of_layer = _alike_layers(_joined(decode_lens, gaps))
        shapes = []
        for layer in exemplars:
            lengths = decode_lens[layer].astype(np.int32)
            rows = len(lengths)
            starts = np.arange(rows + 1, dtype=np.int32)
            shapes.append(
                RowShapes(
                    rows, starts, lengths, np.arange(rows), self._gaps(gaps[layer])
                )
            )
        tables = self._decode_tables(num_decodes)
        return StepRows(num_decodes, shapes, shape_of_layer, tables, slots)

    def _decode_tables(self, num_decodes: int) -> PageArray | list[PageArray]:
        """Pages of each layer's decode rows."""
        ordered = self._tables.ordered[:, :num_decodes]
        if not self._layout:
            return ordered.reshape(len(ordered), -1, ordered.shape[-1])
        tables = []
        for one, by_lane in zip(self._layout, ordered, strict=True):
            pages = one.pages(by_lane.swapaxes(1, 2).astype(np.int64)).swapaxes(1, 2)
            tables.append(pages.reshape(-1, pages.shape[-1]).astype(np.int32))
        return tables

    def _gaps_of_decodes(self, seq_lens: IntArray) -> IntArray:
        """Gaps of each layer's decode rows, one behind the other; none, if none has."""
        gaps = self._tables.gaps(seq_lens)
        if gaps is None:
            return np.zeros((self._plan.num_layers, 0), dtype=np.int64)
        return gaps.reshape(len(gaps), -1)

    def _gaps(self, *parts: IntArray) -> Int32Array | None:
        """Gaps of rows as kernels take them."""
        if not self._tables.thins:
            return None
        return np.concatenate(parts).reshape(-1, 2).astype(np.int32)

    def _of_heads(self, by_lane: IntArray) -> Layers:
        """Flatten ``[num_layers, rows, lanes]`` to kernel rows of each layer."""
        if not self._layout:
            return by_lane.reshape(len(by_lane), -1)
        layers = zip(self._layout, by_lane, strict=True)
        return [lanes[:, one.lane_of_head].ravel() for one, lanes in layers]

    def _slots_of_heads(self, by_lane: IntArray) -> Layers:
        """The same of slots, which kernels read one after the other."""
        if not self._layout:
            # With one head they may be a view.
            return np.ascontiguousarray(self._of_heads(by_lane))
        pages, places = np.divmod(by_lane, self._plan.page_size)
        of_head = self._of_heads(places)
        return [
            one.pages(pages[layer]).ravel() * self._plan.page_size + of_head[layer]
            for layer, one in enumerate(self._layout)
        ]

    def _lanes(self, layer: int) -> list[int]:
        """The lane of each of a layer's heads."""
        if not self._layout:
            return [*range(self._plan.num_kv_heads)]
        lanes: list[int] = self._layout[layer].lane_of_head.tolist()
        return lanes

    def _with_prefill(
        self, decode_lens: IntArray, gaps: IntArray, chunks: _Chunks, layer: int
    ) -> RowShapes:
        lanes = self._lanes(layer)
        decodes, heads = len(decode_lens), len(lanes)
        lengths, seq_lens = [np.ones_like(decode_lens)], [decode_lens]
        first = [np.arange(decodes)]
        for head, lane in enumerate(lanes):
            row_lengths, row_seq_lens = chunks.rows(layer, lane)
            lengths.append(row_lengths)
            seq_lens.append(row_seq_lens)
            first.append(decodes + (row_lengths.cumsum() - row_lengths) * heads + head)
        starts = np.concatenate([[0], *lengths]).cumsum()
        return RowShapes(
            decodes,
            starts.astype(np.int32),
            np.concatenate(seq_lens).astype(np.int32),
            np.concatenate(first),
            self._gaps(gaps, *(chunks.gaps(layer, lane) for lane in lanes)),
        )

    def _page_tables(
        self, decode: PageArray | list[PageArray], chunks: _Chunks
    ) -> list[PageArray]:
        """Pages of each layer's rows, those of ``decode`` first."""
        tables = []
        for layer, first in enumerate(decode):
            parts = [chunks.page_table(layer, lane) for lane in self._lanes(layer)]
            if self._layout:
                one = self._layout[layer]
                places = one.place_of_head.tolist()
                parts = [
                    part * one.per_page + place
                    for part, place in zip(parts, places, strict=True)
                ]
            tables.append(np.concatenate([first, *parts]))
        return tables


def _joined(first: Layers, second: Layers) -> Layers:
    """Lay what is of each layer end to end."""
    if isinstance(first, list) or isinstance(second, list):
        return [np.concatenate(both) for both in zip(first, second, strict=True)]
    return np.concatenate([first, second], axis=1)


def _alike_layers(values: Layers) -> tuple[list[int], list[int]]:
    """Group layers of equal ``values [num_layers, ...]``.

    Returns:
        The first layer of each group, and the group of each layer.
    """
    groups: dict[bytes, int] = {}
    first: list[int] = []
    group_of_layer = []
    for layer, row in enumerate(values):
        group = groups.setdefault(row.tobytes(), len(groups))
        if group == len(first):
            first.append(layer)
        group_of_layer.append(group)
    return first, group_of_layer


class _Chunks:
    """The prefill part of one step: each request's chunk, cut at page boundaries.

    Attributes:
        first_row: batch row of the first chunk.
        lengths, seq_lens: queries and keys of each chunk, ``[chunks]``.
        block_lengths: queries in each touched block, ``[blocks]``.
        visible: keys that a block's last query sees, ``[layers, heads, blocks]``.
        bounded_tables: pages a block's queries read, ``[layers, heads, blocks, w]``.
    """

    def __init__(
        self,
        plan: PagePlan,
        tables: PageTables,
        query_start: IntArray,
        seq_lens: IntArray,
        first_row: int,
    ) -> None:
        self._plan, self._by_slot = plan, tables.by_slot
        self._history = tables.history
        self.first_row = first_row
        self.lengths = np.diff(query_start)[first_row:]
        self.seq_lens = seq_lens[first_row:]
        size = plan.page_size
        first_token = self.seq_lens - self.lengths
        first_block, last_block = first_token // size, (self.seq_lens - 1) // size
        counts = last_block - first_block + 1
        self._chunk = np.repeat(np.arange(len(counts)), counts)
        ends = counts.cumsum()
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        self._block = first_block[self._chunk] + within
        start = np.maximum(self._block * size, first_token[self._chunk])
        stop = np.minimum((self._block + 1) * size, self.seq_lens[self._chunk])
        self.block_lengths = stop - start
        self._offset = start % size
        self._is_last_of = self._block - last_block[self._chunk]
        self._lanes = tables.lanes.by_head(first_row + self._chunk)
        self._bounded: BoolArray = self._lanes.window > 0
        by_block = self._block[:, None]
        hidden = self._lanes.hidden(by_block)[..., 0]
        self.visible: IntArray = stop - hidden * size
        # A block that is new to this chunk and finds no slot of its own free waits
        # in scratch: its ring slot is still read by the chunk's earlier queries.
        new = within > 0
        self._scratch_index = np.cumsum(new) - 1
        self._in_scratch = new & ~self._lanes.opens(by_block)[..., 0]
        self._own = self._own_pages(by_block)[..., 0]
        scratch = self._scratch_page(self._scratch_index)
        self._pages = np.where(self._in_scratch, scratch, self._own)
        self.bounded_tables = self._bounded_tables()
        self._is_row = self._row_ends(by_block)

    def row_lengths(self) -> IntArray:
        """What the lengths of a layer's rows follow from, ``[layers, any]``."""
        layers = self._plan.num_layers
        parts = [self._is_row.reshape(layers, -1), self.visible.reshape(layers, -1)]
        if self._lanes.page_size:
            gaps = self._lanes.gap(self._block[:, None])
            parts.append(gaps.reshape(layers, -1))
        return np.concatenate(parts, axis=1)

    def _row_ends(self, by_block: IntArray) -> BoolArray:
        """At which of the touched blocks a row ends, ``[layers, heads, blocks]``.

        Full lanes have one row, bounded ones a row for each block; blocks of a thinned
        lane share one for as long as no further group leaves.
        """
        ends: BoolArray = self._bounded | (self._is_last_of == 0)
        if self._lanes.page_size:
            thinned = self._lanes.group > 0
            left = self._lanes.groups(by_block) < self._lanes.groups(by_block + 1)
            ends = np.where(thinned, left[..., 0] | (self._is_last_of == 0), ends)
        return ends

    def gaps(self, layer: int, head: int) -> IntArray:
        """First hidden key, and first behind, of a head's rows, ``[2 * rows]``."""
        if not self._lanes.page_size:
            return np.zeros(0, dtype=np.int64)
        of_blocks = self._lanes.gap(self._block[:, None])[layer, head, :, 0]
        gaps: IntArray = of_blocks[self._is_row[layer, head]].ravel()
        return gaps

    def rows(self, layer: int, head: int) -> tuple[IntArray, IntArray]:
        """Queries of each of a head's rows, and keys that the row's last one sees."""
        ends = np.flatnonzero(self._is_row[layer, head])
        lengths = np.diff(self.block_lengths.cumsum()[ends], prepend=0)
        return lengths, self.visible[layer, head, ends]

    def page_table(self, layer: int, head: int) -> PageArray:
        """Pages of each of a head's rows, ``[rows, width]``."""
        bounded, is_row = self._bounded[layer, head], self._is_row[layer, head]
        rows = (self.first_row + self._chunk)[is_row]
        tables: PageArray = self._by_slot[layer, rows, head, : self._history]
        if bounded.any():
            listed = self.bounded_tables[layer, head][bounded & is_row]
            tables[bounded[is_row], : listed.shape[1]] = listed
        return tables

    def _scratch_page(self, index: IntArray) -> IntArray:
        """Scratch page of a block, ``[layers, heads, *index.shape]``; 1..K are scratch.

        Layers run one after the other and use the same pages, but for layers whose
        lanes others read later.
        """
        plan, ones = self._plan, [1] * index.ndim
        areas = np.zeros(plan.num_layers, dtype=np.int64)
        areas[list(plan.reread)] = 1 + np.arange(len(plan.reread))
        stride = int(self._scratch_index[-1]) + 1
        heads = np.arange(plan.num_kv_heads) + plan.num_kv_heads * areas[:, None]
        page: IntArray = 1 + heads.reshape(*heads.shape, *ones) * stride + index
        return page

    def _own_pages(self, block: IntArray) -> IntArray:
        """Pages in the requests' own lists, ``[layers, heads, blocks, n]``.

        Args:
            block: blocks of the request of each touched block.
        """
        layers = np.arange(self._plan.num_layers)[:, None, None, None]
        heads = np.arange(self._plan.num_kv_heads)[None, :, None, None]
        rows = (self.first_row + self._chunk)[:, None]
        slot = self._lanes.slot_of(block)
        pages: PageArray = self._by_slot[layers, rows, heads, slot]
        return pages.astype(np.int64)

    def _bounded_tables(self) -> PageArray:
        if not self._bounded.any():
            return np.zeros((*self._bounded.shape, 0), dtype=np.int32)
        seen = -(-self.visible // self._plan.page_size)
        width = int(seen[self._bounded].max())
        by_block = self._block[:, None]
        visible = self._lanes.visible(by_block, width, self._history)[..., 0, :]
        listed = (visible >= 0) & (visible < self._history)
        distance = np.where(listed, visible - by_block, 0)
        # Listed blocks of this chunk are the touched block `distance` places back.
        touched = np.arange(len(self._block))[:, None] + distance
        same_chunk = (touched >= 0) & (
            self._chunk[np.maximum(touched, 0)] == self._chunk[:, None]
        )
        own = self._own_pages(np.maximum(visible, 0))
        layers = np.arange(visible.shape[0])[:, None, None, None]
        heads = np.arange(visible.shape[1])[None, :, None, None]
        written = self._pages[layers, heads, np.maximum(touched, 0)]
        return np.where(same_chunk & listed, written, own).astype(np.int32)

    def slots(self) -> IntArray:
        """Slot of each prefill token and lane, ``[layers, tokens, lanes]``."""
        token_block = np.repeat(np.arange(len(self._block)), self.block_lengths)
        begin = self.block_lengths.cumsum() - self.block_lengths
        within = np.arange(len(token_block)) - begin[token_block]
        offset = self._offset[token_block] + within
        slots: IntArray
        slots = self._pages[:, :, token_block] * self._plan.page_size + offset
        return slots.swapaxes(1, 2)

    def copies(self) -> list[tuple[IntArray, IntArray]]:
        """Scratch pages that survive the chunk and the ring pages they go to."""
        survives = self._in_scratch & (self._is_last_of > -self._lanes.window)
        survives &= self._lanes.present
        return [
            (self._pages[layer][survives[layer]], self._own[layer][survives[layer]])
            for layer in range(self._plan.num_layers)
        ]
