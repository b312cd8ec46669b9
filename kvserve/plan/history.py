# SPDX-License-Identifier: Apache-2.0
"""Pages of thinned history: how many there are, and where a page list has them.

When a group lies in front of the window of every query to come, each thinned lane
keeps its ``k`` best tokens of it: an *event*. What a lane has kept so far is one row of
tokens, packed into *history pages*. An event opens pages for what it keeps, and for the
page that the event before left half empty: its tokens are written again, in front of
the new ones, and the old page is given back. So no page is ever written over, and
requests that share a prefix may share it as it was after any event.

Event ``j`` is that of group ``j - 1``, and happens when the last token in front of
block ``block_of(j)`` is computed. Its pages are listed behind the pages of that block,
lane after lane. All thinned lanes have events at once, so counts are closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvserve.plan.lanes import IntArray


@dataclass(frozen=True)
class History:
    """Of the lanes of one rank.

    Attributes:
        keep: tokens that each lane keeps of a group, ``[num_lanes]``, 0 where it is not
            thinned.
        sinks: blocks in front of the first group.
        window: last blocks that a query sees, its own included.
        group: blocks of a group; 0 if no lane is thinned.
        page_size: tokens of a page.
    """

    keep: IntArray
    sinks: int
    window: int
    group: int
    page_size: int

    @property
    def reach(self) -> int:
        """Blocks behind the window that may wait for their group to be complete."""
        return max(self.group - 1, 0)

    @property
    def first(self) -> int:
        """Block in front of which the first group begins to leave."""
        return self.sinks + self.window - 1

    def events(self, block: int) -> int:
        """Events that have happened before a query in ``block`` is computed."""
        return max(block - self.first, 0) // self.group if self.group else 0

    def events_of_each(self, block: IntArray) -> IntArray:
        """:meth:`events` of each element."""
        beyond = np.maximum(block - self.first, 0)
        events: IntArray = beyond // self.group if self.group else np.zeros_like(beyond)
        return events

    def block_of(self, event: int) -> int:
        """The block that is next when an event happens."""
        return self.first + event * self.group

    def group_of(self, event: int) -> int:
        """The first block of the group that leaves in an event."""
        return self.sinks + (event - 1) * self.group

    def opened(self, events: IntArray | int) -> IntArray:
        """Pages that the first ``events`` events open in each lane.

        Each opens the pages of its tokens, and one more where the event before has left
        a page half empty.

        Returns:
            ``[*events.shape, num_lanes]``.
        """
        done, size = np.asarray(events)[..., None], self.page_size
        even = np.gcd(self.keep, size)
        pages: IntArray = done * self.keep // size + done - done * even // size
        return pages

    def entries(self, events: IntArray) -> IntArray:
        """:meth:`total` of each element."""
        if not self.group:
            return np.zeros_like(events)
        most = int(events.max(initial=0))
        by_events = self.opened(np.arange(most + 1)).sum(axis=-1)
        counts: IntArray = by_events[events]
        return counts

    def total(self, events: int) -> int:
        """Pages that the first ``events`` events open in all lanes."""
        return int(self.opened(events).sum()) if self.group else 0

    def held(self, events: int) -> IntArray:
        """Pages that each lane's tokens lie in once ``events`` events have happened."""
        pages: IntArray = -(-events * self.keep // self.page_size)
        return pages

    def pages_of(self, event: int) -> tuple[IntArray, IntArray]:
        """The lane of each page that an event opens, and its number in the lane's row.

        Returns:
            Two arrays, in the order of the page list.
        """
        first = (event - 1) * self.keep // self.page_size
        counts = self.held(event) - first
        lane = np.repeat(np.arange(len(counts)), counts)
        begins = counts.cumsum() - counts
        return lane, np.arange(len(lane)) - begins[lane] + first[lane]

    def half_empty(self, event: int) -> IntArray:
        """Which pages of an event the next one writes again, as their places in it."""
        lane, page = self.pages_of(event)
        ends = event * self.keep[lane]
        return np.flatnonzero((page + 1) * self.page_size > ends)
