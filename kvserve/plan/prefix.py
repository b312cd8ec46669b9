# SPDX-License-Identifier: Apache-2.0
"""Which pages of a common prefix a request needs, and which it gives back.

Under a policy of positions the cache after ``n`` tokens depends on the first ``n``
tokens alone, so a request may start with pages that another one has filled. It starts
at a *boundary*, the first token of a block: what its next query sees of the blocks
before must be there, of every lane, and nothing else need be. In a full lane these are
all blocks, in a bounded one sinks, shards and the window.

A page that a hash names is never written over. Hence blocks recycle no pages here:
each opens a page in every lane, and pages that no later query sees are given back to
the pool, where they serve other requests until they are given out again. Behind the
pages of a block the page list has those into which groups are packed that leave with
its last token: they follow from the text up to there as well. A page is written only
while its block is being filled; it is named when the block is full and boundaries lie
behind full blocks, so no request is ever given a page that is still to be written by
another step.

A *place* is a page's number among those of a block: first a lane's number on its rank,
then what is packed. All ranks use one page list, so a page is needed as long as any
rank needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvserve.plan.lanes import IntArray
from kvserve.plan.page_plan import PagePlan

_FOREVER = 1 << 40
"""A query that has left every window behind."""


class PrefixPages:
    """What requests with one plan need of a prefix.

    Attributes:
        window: blocks that the longest window holds, of thinned lanes with all that
            waits to be packed, and where it was packed last.
    """

    def __init__(self, plan: PagePlan) -> None:
        assert plan.is_shared
        self._plan, self._history = plan, plan.history
        self._lanes = plan.num_layers * plan.heads_per_rank
        ranks = plan.by_rank
        windows = np.max([rank.lanes.window for rank in ranks], axis=0).ravel()
        aligned = ranks[0].lanes.aligned.ravel()
        thinned = ranks[0].lanes.group.ravel() > 0
        self.window = plan.longest_window
        if plan.group:
            self.window = max(self.window, self._history.window + plan.group)
        slides = ~aligned & ~thinned
        self._reaching = [
            np.flatnonzero((windows > distance) & slides).tolist()
            for distance in range(self.window)
        ]
        self._thinned = np.flatnonzero(thinned).tolist()
        self._packed_by: dict[int, tuple[list[int], list[int]]] = {}
        self._chunks = {
            int(chunk): np.flatnonzero(aligned & (windows == chunk)).tolist()
            for chunk in set(windows[aligned].tolist()) - {0}
        }
        sinks = max(int(rank.lanes.sinks.max()) for rank in ranks)
        # Behind all sinks, what stays repeats with every turn.
        self._settled = sinks
        blocks = np.arange(sinks + plan.stride)
        self._staying = [
            np.flatnonzero(row).tolist() for row in plan.needed(blocks, _FOREVER)
        ]

    def first_entry(self, block: int) -> int:
        """Where a page list has the first page of a block."""
        return block * self._lanes + self._history.total(self._history.events(block))

    def width(self, block: int) -> int:
        """Entries that a page list has for a block."""
        return self.first_entry(block + 1) - self.first_entry(block)

    def blocks_of(self, entries: IntArray) -> IntArray:
        """The block of each entry of a page list."""
        blocks = np.arange(int(entries.max(initial=0)) // self._lanes + 1)
        events = self._history.events_of_each(blocks)
        first = blocks * self._lanes + self._history.entries(events)
        found: IntArray = np.searchsorted(first, entries, side="right") - 1
        return found

    def staying(self, block: int) -> Sequence[int]:
        """Places of pages that every later query sees."""
        event, beyond = self._event_behind(block), block - self._settled
        if beyond >= 0:
            block = self._settled + beyond % self._plan.stride
        places: list[int] = self._staying[block]
        return places + self._packed(event)[0] if event else places

    def _event_behind(self, block: int) -> int:
        """The event that happens with a block's last token, or 0."""
        event = self._history.events(block + 1)
        return event if event > self._history.events(block) else 0

    def _packed(self, event: int) -> tuple[list[int], list[int]]:
        """Places of pages that an event fills, and of those left half empty."""
        if event not in self._packed_by:
            self._packed_by[event] = self._find_packed(event)
        return self._packed_by[event]

    def _find_packed(self, event: int) -> tuple[list[int], list[int]]:
        pages = len(self._history.pages_of(event)[0])
        half = self._history.half_empty(event).tolist()
        filled = [page for page in range(pages) if page not in half]
        return (
            [self._lanes + page for page in filled],
            [self._lanes + page for page in half],
        )

    def reaching(self, block: int, boundary: int) -> Sequence[int]:
        """Places of pages that queries in ``boundary`` see, but not all behind them."""
        distance = boundary - block
        places: list[int] = self._reaching[distance] if distance < self.window else []
        if self._thinned:
            places = places + self._waiting(block, boundary)
        for chunk, own in self._chunks.items():
            if block >= boundary - boundary % chunk:
                places = places + own
        return places

    def _waiting(self, block: int, boundary: int) -> list[int]:
        """The same of thinned lanes: what is not packed yet, and last pages."""
        history, places = self._history, []
        events = history.events(boundary)
        if block >= history.group_of(events + 1):
            places += self._thinned
        event = self._event_behind(block)
        if event and event == events:
            places += self._packed(event)[1]
        return places
