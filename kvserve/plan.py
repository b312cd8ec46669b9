# SPDX-License-Identifier: Apache-2.0
"""The page plan: how many pages a request holds, and which page holds what.

Everything here is a pure function of the policy's budgets and of token counts. The
scheduler and the worker each evaluate the same plan, so no message passes between
them: the scheduler counts pages, the worker knows which entry of a request's page
list belongs to which head.

A *lane* is the cache of one KV head in one layer. Tokens are grouped in *blocks* of
``page_size`` tokens at absolute positions, and a page holds one block of one lane.

* A full lane holds every block; block ``b`` lives in slot ``b``.
* A bounded lane holds its sink blocks ``0 .. s-1`` for good and its last ``w`` blocks
  in a ring: block ``b >= s`` lives in slot ``s + (b - s) % w``.

A query in block ``i`` of a bounded lane sees the sink blocks and blocks
``i - w + 1 .. i``, causally. The rule mentions positions alone, so what a request
computes cannot depend on how its prompt was cut into chunks or on its neighbours.

A request's page list grows block by block: when block ``b`` is opened, each lane that
has a slot ``b`` gets one page, lanes of larger capacity first. Hence the list index of
a lane's slot never changes while the request lives.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvserve.errors import UserError
from policies.base import HeadBudget

IntArray = npt.NDArray[np.int64]

UNBOUNDED = 1 << 40
"""Capacity, in blocks, of a full lane: more than any request can open."""


def blocks_of(tokens: int, page_size: int) -> int:
    """Number of blocks that ``tokens`` tokens touch."""
    return -(-tokens // page_size)


def _lane_blocks(
    head: HeadBudget, page_size: int, max_tokens: int | None
) -> tuple[int, int]:
    """Sinks and window of one lane, in blocks; ``(0, 0)`` for a full lane."""
    if head.recent is None:
        return 0, 0
    if min(head.sinks, head.recent) < 1:
        raise UserError(
            "--policy: a bounded head keeps at least one sink page and one recent "
            f"page, not {head.sinks} + {head.recent} tokens"
        )
    sinks = blocks_of(head.sinks, page_size)
    window = blocks_of(head.recent, page_size)
    if max_tokens is not None and sinks + window >= blocks_of(max_tokens, page_size):
        return 0, 0
    return sinks, window


@dataclass(frozen=True)
class PagePlan:
    """Sinks and window of every lane, in blocks.

    ``sinks`` and ``windows`` have shape ``[num_layers][num_kv_heads]``; a window of 0
    marks a full lane. Plans are hashable and travel from the worker to the scheduler
    inside the KV cache spec.
    """

    page_size: int
    sinks: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...]

    @classmethod
    def from_budgets(
        cls,
        budgets: tuple[tuple[HeadBudget, ...], ...],
        page_size: int,
        max_tokens: int | None = None,
    ) -> PagePlan:
        """Round every budget up to whole pages.

        A head whose budget holds ``max_tokens`` tokens, the longest a request may be,
        never evicts: its lane is a full one.
        """
        lanes = [
            [_lane_blocks(head, page_size, max_tokens) for head in layer]
            for layer in budgets
        ]
        return cls(
            page_size,
            tuple(tuple(sinks for sinks, _ in layer) for layer in lanes),
            tuple(tuple(window for _, window in layer) for layer in lanes),
        )

    @property
    def num_layers(self) -> int:
        return len(self.sinks)

    @property
    def num_kv_heads(self) -> int:
        return len(self.sinks[0])

    @property
    def has_bounded_lanes(self) -> bool:
        return bool((self.capacity < UNBOUNDED).any())

    @cached_property
    def sink_array(self) -> IntArray:
        """Sink blocks, shape ``[num_layers, num_kv_heads]``."""
        return np.array(self.sinks, dtype=np.int64)

    @cached_property
    def window_array(self) -> IntArray:
        """Window blocks (0: full lane), shape ``[num_layers, num_kv_heads]``."""
        return np.array(self.windows, dtype=np.int64)

    @cached_property
    def capacity(self) -> IntArray:
        """Slots of each lane, shape ``[num_layers, num_kv_heads]``."""
        bounded = self.sink_array + self.window_array
        return np.where(self.window_array > 0, bounded, UNBOUNDED)

    @cached_property
    def _rank(self) -> IntArray:
        """Place of each lane among the lanes that open a page together."""
        order = np.argsort(-self.capacity.ravel(), kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        return rank.reshape(self.capacity.shape)

    @cached_property
    def _bounded_offsets(self) -> IntArray:
        """Pages held when ``b`` blocks are open, up to the largest bounded lane."""
        capacity = self.capacity.ravel()
        bounded = capacity[capacity < UNBOUNDED]
        opened = np.arange(int(bounded.max(initial=0)) + 1)
        held: IntArray = np.minimum(capacity[None, :], opened[:, None]).sum(axis=1)
        return held

    @cached_property
    def _num_full_lanes(self) -> int:
        return int((self.capacity == UNBOUNDED).sum())

    def pages(self, tokens: int) -> int:
        """Pages that a request of ``tokens`` tokens holds, over all layers and heads.

        Never shrinks as tokens are added.
        """
        offsets = self._bounded_offsets
        blocks = blocks_of(tokens, self.page_size)
        beyond = max(0, blocks - (len(offsets) - 1))
        return int(offsets[blocks - beyond]) + beyond * self._num_full_lanes

    def most_pages(self, tokens: int) -> int:
        """Pages that a request needs on its way to ``tokens`` tokens."""
        return self.pages(tokens)

    @property
    def full(self) -> PagePlan:
        """The plan of the same model that evicts nothing."""
        nothing = ((0,) * self.num_kv_heads,) * self.num_layers
        return replace(self, sinks=nothing, windows=nothing)

    def list_index(self, slot: IntArray) -> IntArray:
        """Index into the request's page list of each lane's ``slot``.

        Args:
            slot: slots of shape ``[num_layers, num_kv_heads, n]``, each below the
                lane's capacity.

        Returns:
            Indices of the same shape.
        """
        offsets = self._bounded_offsets
        within = np.minimum(slot, len(offsets) - 1)
        start = offsets[within] + (slot - within) * self._num_full_lanes
        index: IntArray = start + self._rank[:, :, None]
        return index

    def slot_of(self, block: IntArray) -> IntArray:
        """Slot of each block in each lane, shape ``[num_layers, num_kv_heads, n]``.

        Args:
            block: absolute block numbers, broadcastable to the result's shape.
        """
        sinks, window = self.sink_array[..., None], self.window_array[..., None]
        ring = sinks + (block - sinks) % np.maximum(window, 1)
        return np.where((window == 0) | (block < sinks), block, ring)

    @property
    def bounded_width(self) -> int:
        """Slots of the largest bounded lane, 0 without bounded lanes."""
        return len(self._bounded_offsets) - 1

    def visible_blocks(self, block: IntArray) -> IntArray:
        """Blocks that a query in ``block`` sees in each bounded lane, ascending.

        Args:
            block: absolute block numbers of shape ``[n]``.

        Returns:
            Shape ``[num_layers, num_kv_heads, n, bounded_width]``, padded with -1; the
            last block listed is the query's own. Full lanes have no meaning here.
        """
        place = np.arange(self.bounded_width)
        sinks, window = self.sink_array[..., None, None], self.window_array[..., None]
        last = block[None, None, :, None]
        skipped = np.maximum(last - window[..., None] + 1 - sinks, 0)
        visible = np.where(place < sinks, place, place + skipped)
        return np.where(visible <= last, visible, -1)

    def visible_tokens(self, tokens: IntArray) -> IntArray:
        """Tokens that the last of ``tokens`` tokens sees in each lane, itself included.

        Args:
            tokens: sequence lengths of shape ``[n]``, each at least 1.

        Returns:
            Shape ``[num_layers, num_kv_heads, n]``.
        """
        block = (tokens - 1) // self.page_size
        hidden = np.maximum(block + 1 - self.capacity[..., None], 0)
        visible: IntArray = tokens - hidden * self.page_size
        return visible

    def describe(self) -> str:
        """Say in one line what the lanes keep, in tokens as rounded to pages."""
        size, total = self.page_size, self.capacity.size
        kinds = Counter(
            lane
            for layer in zip(self.sinks, self.windows, strict=True)
            for lane in zip(*layer, strict=True)
        )
        parts = [
            f"{count} keep {sinks * size} sinks + {window * size} recent tokens"
            if window
            else f"{count} keep everything"
            for (sinks, window), count in sorted(kinds.items())
        ]
        return f"of {total} KV heads {'; '.join(parts)} (pages of {size} tokens)"

    def retained(self, layer: int, head: int, tokens: int) -> list[int]:
        """Positions that a lane holds after ``tokens`` tokens, ascending."""
        last = blocks_of(tokens, self.page_size)
        sinks, window = self.sinks[layer][head], self.windows[layer][head]
        oldest = last - window if window else 0
        return [
            position
            for position in range(tokens)
            if position // self.page_size < sinks
            or position // self.page_size >= oldest
        ]


def scratch_pages(plan: PagePlan, max_tokens: int, max_requests: int) -> int:
    """Pages that one step's prefill may need beside what requests hold.

    A chunk's blocks that would overwrite ring slots still needed by the chunk's own
    early queries are kept here until attention is done. The area serves one layer at
    a time. Of a chunk of ``t`` tokens at most ``(t - 1 + page_size - 1) // page_size``
    blocks are new to it, and a chunk of one token needs none.

    Args:
        max_tokens: tokens that one step may schedule.
        max_requests: requests that one step may schedule.
    """
    if not plan.has_bounded_lanes:
        return 0
    chunks = min(max_requests, max_tokens // 2)
    blocks = max_tokens // plan.page_size + chunks
    return blocks * plan.num_kv_heads
