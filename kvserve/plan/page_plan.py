# SPDX-License-Identifier: Apache-2.0
"""The page plan: how many pages a request holds, and which page holds what.

Everything here is a pure function of the policy's budgets and of token counts. The
scheduler and the worker each evaluate the same plan, so no message passes between
them: the scheduler counts pages, the worker knows which entry of a request's page
list belongs to which head.

A *lane* is the cache of one KV head in one layer. Tokens are grouped in *blocks* of
``page_size`` tokens at absolute positions, and a page holds one block of one lane.
``kvserve.plan.lanes`` says which blocks a lane keeps and where each of them lives.

What a query sees is the policy's, and by the model itself it may be less: lanes of a
layer that is *local* hold its window or chunk, under every policy. They have no sinks.
Their window is as many blocks as its tokens may touch; kernels hide the rest of them.

A query in block ``i`` of a bounded lane sees the sink blocks, the lane's shards and
blocks ``i - w + 1 .. i``, causally. The rule mentions positions alone, so what a
request computes cannot depend on how its prompt was cut into chunks or on its
neighbours.

A request's page list grows block by block: when block ``b`` is opened, each lane that
has a slot ``b`` gets one page, in the order of lanes. Hence the list index of a lane's
slot never changes while the request lives.

Where requests share pages, where lanes are thinned, and where tokens are guessed, no
page is written over: every block opens a page in every lane, and pages that no later
query sees are given back to the pool between steps. See ``kvserve.plan.prefix`` and
``kvserve.plan.history``. A guess that is refused has taken nothing, then: what it was
written to is written again, and what the token before it still sees has stayed.

Under tensor parallelism every rank owns some heads of each layer and a pool of its own,
but all ranks get the same page list. Each numbers its own lanes and uses the list from
the front, so a list as long as the largest rank needs is right for all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvserve.errors import UserError
from kvserve.plan.blocks import NOT_THINNED, blocks_of, group_of, lanes_of
from kvserve.plan.history import History
from kvserve.plan.lanes import BoolArray, IntArray, Lanes
from kvserve.plan.layout import LayerHeads
from kvserve.plan.page_list import PageList
from kvserve.plan.peaks import most_pages
from policies.base import HeadBudget, Local

_NOTHING: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class PagePlan:
    """Sinks, window and shards of every lane, in blocks.

    ``sinks`` and ``windows`` have shape ``[num_layers][num_kv_heads]``; a window of 0
    marks a full lane. ``shards``, of the same shape or empty, has a bit for each block
    of a turn of ``stride`` that stays for good. Of ``ranks`` ranks each owns as many
    heads of a layer, in order. Lanes whose pages are shared recycle none. ``local``
    says of each layer what its queries may see, or is empty if that is everything.
    ``reread`` are layers whose lanes later layers read: what waits in scratch waits
    longer there. ``layout`` says how the heads of each layer make its lanes, or is
    empty if all have lanes of their own; a layer may have fewer lanes than others.
    Of every ``group`` blocks, thinned lanes keep ``keep`` tokens, ``[num_layers]
    [num_kv_heads]``, -1 in lanes that are not; both are empty where none is. Tokens of
    ``spans``, each a first one and the first behind, they keep before others.
    ``lookahead`` are the tokens that a step may compute before it is known whether the
    request has them at all: speculative decoding.
    Plans are hashable and travel from the worker to the scheduler inside the KV cache
    spec.
    """

    page_size: int
    sinks: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...]
    stride: int = 1
    shards: tuple[tuple[int, ...], ...] = ()
    ranks: int = 1
    is_shared: bool = False
    local: tuple[Local | None, ...] = ()
    reread: tuple[int, ...] = ()
    layout: tuple[LayerHeads, ...] = ()
    group: int = 0
    keep: tuple[tuple[int, ...], ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    lookahead: int = 0

    @classmethod
    def from_budgets(
        cls,
        budgets: tuple[tuple[HeadBudget, ...], ...],
        page_size: int,
        max_tokens: int | None = None,
        ranks: int = 1,
        shared: bool = False,
        local: tuple[Local | None, ...] = (),
        num_kv_heads: int | None = None,
        layout: tuple[LayerHeads, ...] = (),
    ) -> PagePlan:
        """Round every budget up to whole pages.

        A head whose budget holds ``max_tokens`` tokens, the longest the request may
        be, never evicts: its lane is a full one. Where there are more ranks than heads,
        a head has a lane on each of its ranks.

        Args:
            budgets: of the layers that are not local, ``[layers][num_kv_heads]``.
            num_kv_heads: to be given if there may be none; the most lanes of a layer.
        """
        num_kv_heads = num_kv_heads or len(budgets[0])
        copies = max(1, ranks // num_kv_heads)
        lanes = lanes_of(budgets, page_size, max_tokens, copies, local, num_kv_heads)
        sinks, windows, shards, keep = (
            tuple(tuple(lane[part] for lane in layer) for layer in lanes)
            for part in range(4)
        )
        strides = {1}
        if any(map(any, shards)):
            heads = (head for layer in budgets for head in layer)
            strides = {head.stride for head in heads if head.shards}
        else:
            shards = ()
        if len(strides) > 1:
            raise UserError(f"--policy: heads of different strides {sorted(strides)}")
        (stride,) = strides
        of_pages = page_size, sinks, windows, stride, shards
        group = group_of(budgets, page_size)
        if not any(kept != NOT_THINNED for layer in keep for kept in layer):
            group, keep = 0, ()
        return cls(
            *of_pages, ranks, shared, local, layout=layout, group=group, keep=keep
        )

    @property
    def num_layers(self) -> int:
        return len(self.sinks)

    @property
    def num_kv_heads(self) -> int:
        return len(self.sinks[0])

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def heads_per_rank(self) -> int:
        return self.num_kv_heads // self.ranks

    @cached_property
    def by_rank(self) -> tuple[PagePlan, ...]:
        """The plan of each rank's own heads."""
        if self.ranks == 1:
            return (self,)
        width = self.heads_per_rank
        return tuple(
            PagePlan(
                self.page_size,
                _columns(self.sinks, first, width),
                _columns(self.windows, first, width),
                self.stride,
                _columns(self.shards, first, width),
                is_shared=self.is_shared,
                local=self.local,
                reread=self.reread,
                group=self.group,
                keep=_columns(self.keep, first, width),
                spans=self.spans,
                lookahead=self.lookahead,
            )
            for first in range(0, self.num_kv_heads, width)
        )

    @property
    def has_bounded_lanes(self) -> bool:
        return any(map(any, self.windows))

    @property
    def recycles(self) -> bool:
        """Whether blocks are written over those that have left, and none given back."""
        return not (self.is_shared or self.group or self.lookahead)

    @cached_property
    def lanes(self) -> Lanes:
        """The lanes as arrays ``[num_layers, num_kv_heads]``."""
        sinks = np.array(self.sinks, dtype=np.int64)
        # Of Python's whole numbers: int64 has no bit for the 64th place.
        shards, places = self.shards or self.full.sinks, range(self.stride)
        stays = np.array(
            [
                [[kept >> place & 1 for place in places] for kept in row]
                for row in shards
            ],
            dtype=bool,
        )
        windows = np.array(self.windows, dtype=np.int64)
        aligned = np.zeros(windows.shape, dtype=bool)
        for layer, local in enumerate(self.local):
            aligned[layer] = local is not None and local.is_chunk
        lanes = Lanes.make(sinks, windows, stays, self.recycles, aligned, self.present)
        if not self.group:
            return lanes
        keep = np.array(self.keep, dtype=np.int64)
        group = np.where(keep == NOT_THINNED, 0, self.group)
        return lanes.thinned(group, np.maximum(keep, 0), self.page_size)

    @cached_property
    def history(self) -> History:
        """The history pages of thinned lanes; of a rank's own, if there are several."""
        keep = np.array(self.keep or self.sinks, dtype=np.int64).ravel()
        of_group, size = keep != NOT_THINNED, self.page_size
        if not of_group.any() or not self.group:
            return History(np.zeros_like(keep), 0, 0, 0, size)
        sinks = int(np.array(self.sinks).ravel()[of_group].max())
        window = int(np.array(self.windows).ravel()[of_group].max())
        return History(np.maximum(keep, 0), sinks, window, self.group, size)

    @cached_property
    def present(self) -> BoolArray:
        """Which lanes there are, ``[num_layers, num_kv_heads]``: all, if alike."""
        present = np.ones((self.num_layers, self.num_kv_heads), dtype=bool)
        for layer, heads in enumerate(self.layout):
            present[layer, heads.num_lanes :] = False
        return present

    @cached_property
    def digest(self) -> str:
        """A name for the plan: what a cached page holds follows from it and the text.

        Hidden states depend on what every layer before has seen.
        """
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]

    @cached_property
    def page_list(self) -> PageList:
        """Where the page list of a rank has what."""
        assert self.ranks == 1, "each rank numbers its own lanes: use by_rank"
        return PageList(self.lanes, self.history)

    def pages(self, tokens: int, in_flight: int = 1) -> int:
        """Pages that a request of ``tokens`` tokens holds, over all layers and heads.

        On the rank that holds most. Where blocks recycle pages, the number never
        shrinks as tokens are added, and all of the page list is held.

        Args:
            in_flight: tokens that the last steps added. Until these are done, a
                request that gives pages back holds what the first of them sees.
        """
        if self.recycles:
            return self.entries(tokens)
        last = blocks_of(tokens, self.page_size) - 1
        # Of chunks that end in the last block, the one that starts first.
        first = max(0, last * self.page_size + 1 - in_flight) // self.page_size
        return self.entries(tokens) - self._hidden(first)

    @property
    def reading(self) -> PagePlan:
        """By which the page list grows while the prompt is read: for good."""
        return self

    def of_rank(self, rank: int) -> PagePlan:
        """The plan of a rank's own heads; of one that is no rank's, all of it."""
        return self.by_rank[rank] if self.ranks > 1 else self

    def most_pages(self, tokens: int, in_flight: int = 1) -> int:
        """As :meth:`pages`: what a request needs on its way.

        It is no more than at the end, but for chunks, which are given back at once when
        the step that fills them is done, and for groups when they are thinned.
        """
        return most_pages(self, tokens, in_flight)

    def given_back(self, before: int, now: int) -> IntArray:
        """List entries that queries saw when ``before`` tokens were computed, no more.

        Where blocks recycle pages, none is given back.

        Returns:
            Indices, the last first: the first that a pool should give out again.
        """
        before, now = before // self.page_size, now // self.page_size
        first = max(before + 1 - self.longest_window - self.history.reach, 0)
        if self.recycles or now == before or first >= now:
            return _NOTHING
        blocks = np.arange(first, now)
        left = self.needed(blocks, before) & ~self.needed(blocks, now)
        entries: IntArray = np.flatnonzero(left)[::-1] + first * left.shape[1]
        if not self.group:
            return entries
        width, history = left.shape[1], self.history
        entries += history.entries(history.events_of_each(entries // width))
        events = range(max(history.events(before), 1), history.events(now))
        packed = [
            self.page_list.first_of(one) + history.half_empty(one) for one in events
        ]
        return np.sort(np.concatenate([entries, *packed]))[::-1]

    def history_pages(self, tokens: int) -> int:
        """The most pages that one lane's history has once ``tokens`` are computed."""
        events = self.history.events(tokens // self.page_size)
        return int(self.history.held(events).max())

    @cached_property
    def longest_window(self) -> int:
        """Blocks that the longest window of any rank holds."""
        return max(max(layer) for layer in self.windows)

    def owed(self, entries: int) -> int:
        """None: a request gives back as it reads."""
        return 0

    def is_reading(self, tokens: int) -> bool:
        """Never: what leaves a lane's window is gone while the prompt is read."""
        return False

    def chunk(self, start: int, new_tokens: int) -> int:
        """All of them: chunks change nothing."""
        return new_tokens

    def bounds(self) -> tuple[IntArray, IntArray]:
        """Sinks and window of each lane, in tokens; a window of 0 keeps everything."""
        size = self.page_size
        return np.array(self.sinks) * size, np.array(self.windows) * size

    def _hidden(self, block: int) -> int:
        """Pages that no query in ``block`` or a later one sees, on any rank."""
        if self.ranks == 1:
            lanes, query = self.lanes, np.array([block])
            shape = self.num_layers, self.num_kv_heads, 1
            passed = int(np.broadcast_to(lanes.passed(query), shape).sum())
            if not self.group:
                return passed
            events = self.history.events(block)
            seen = int(self.history.held(events).sum())
            return passed + self.history.total(events) - seen
        return int((~self.needed(np.arange(block), block)).sum())

    def needed(self, blocks: IntArray, query: int) -> BoolArray:
        """Which pages queries in block ``query`` or later ones see, on any rank.

        Returns:
            For each of ``blocks`` and for each place in the order of lanes,
            ``[len(blocks), num_lanes / ranks]``.
        """
        shape = self.num_layers, self.heads_per_rank, len(blocks)
        seen = np.zeros(shape, dtype=bool)
        for plan in self.by_rank:
            seen |= plan.lanes.sees(blocks, query)
        by_block: BoolArray = seen.reshape(shape[0] * shape[1], len(blocks)).T
        return by_block

    def entries(self, tokens: int) -> int:
        """Length of the page list of ``tokens`` tokens, given back entries included.

        On the rank whose list is longest.
        """
        if self.ranks > 1:
            return max(plan.entries(tokens) for plan in self.by_rank)
        size = self.page_size
        return self.page_list.length(blocks_of(tokens, size), tokens // size)

    def imbalance(self, tokens: int) -> float:
        """Pages of the largest rank over the mean of all ranks: 1 is even."""
        held = [plan.pages(tokens) for plan in self.by_rank]
        return max(held) * self.ranks / sum(held)

    def lane_tokens(self, tokens: int) -> IntArray:
        """Tokens that the last of ``tokens`` tokens sees in each lane.

        Returns:
            ``[num_layers, num_kv_heads]``.
        """
        last = np.array([blocks_of(tokens, self.page_size) - 1])
        hidden = np.broadcast_to(
            self.lanes.hidden(last)[..., 0], (self.num_layers, self.num_kv_heads)
        )
        seen: IntArray = (tokens - hidden * self.page_size) * self.present
        if self.group:
            first, behind = self.lanes.gap(last)[..., 0, :].T
            seen -= (behind - first).T
        return seen

    @property
    def local_by_layer(self) -> tuple[Local | None, ...]:
        """What the queries of each layer see; ``None``: everything."""
        return self.local or (None,) * self.num_layers

    @property
    def full(self) -> PagePlan:
        """The plan of the same model that evicts nothing but what no query sees."""
        nothing = (0,) * self.num_kv_heads
        return PagePlan(
            self.page_size,
            (nothing,) * self.num_layers,
            tuple(
                row if local else nothing
                for row, local in zip(self.windows, self.local_by_layer, strict=True)
            ),
            ranks=self.ranks,
            local=self.local,
            reread=self.reread,
            layout=self.layout,
        )


def _columns(
    by_head: tuple[tuple[int, ...], ...], first: int, width: int
) -> tuple[tuple[int, ...], ...]:
    return tuple(layer[first : first + width] for layer in by_head)
