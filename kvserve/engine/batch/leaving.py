# SPDX-License-Identifier: Apache-2.0
"""Which groups leave the window in a step, and where what stays of them goes.

Where tokens go follows from positions; which tokens of a group they are, a policy says
on the worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvserve.plan.lanes import IntArray, PageArray
from kvserve.plan.page_plan import PagePlan
from policies.base import Policy


@dataclass(frozen=True)
class Leaving:
    """Groups of one request that leave in this step.

    Attributes:
        raw: pages of each group, ``[num_layers, num_kv_heads, groups * blocks]``.
        packed: page in which a lane's history ends half empty, ``[num_layers,
            num_kv_heads]``; 0 where none does.
        keep: tokens that each lane keeps of a group, of the same shape.
        first: position of the first token that leaves.
        groups: how many leave.
        page_size: tokens of a page.
        sources: what goes to each of ``targets``, of each layer ``[n]``: a place in
            what ``packed`` holds, head after head, and behind it in what is kept of
            ``[num_kv_heads, groups, most]``, where ``most`` is the layer's largest
            ``keep``.
        targets: slots of history pages, of each layer ``[n]``. What would be left of
            the last page is filled by its last token, for kernels hide it but read it.
        spans: tokens that stay before others, each a first one and the first behind.
        policy: the request's own, which judges; ``None``: that of the server.
    """

    raw: PageArray
    packed: PageArray
    keep: IntArray
    first: int
    groups: int
    page_size: int
    sources: list[IntArray]
    targets: list[IntArray]
    spans: tuple[tuple[int, int], ...] = ()
    policy: Policy | None = None


class HistoryPages:
    """Places pages of history in the tables of one request.

    Args:
        plan: of the request.
        column: where its tables have the first history page.
    """

    def __init__(self, plan: PagePlan, column: int) -> None:
        self._plan, self._column = plan, column
        shape = plan.num_layers, plan.num_kv_heads
        self._keep = plan.history.keep.reshape(shape)

    def place(
        self,
        by_slot: PageArray,
        page_list: PageArray,
        events: range,
        computed: int,
    ) -> Leaving | None:
        """Enter the pages of events, and say what moves to them in this step.

        Args:
            by_slot: the request's, ``[num_layers, num_kv_heads, columns]``.
            events: that have happened when the step is done, and are not entered yet.
            computed: events that had happened when it began.
        """
        now = range(max(events.start, computed + 1), events.stop)
        self._enter(by_slot, page_list, range(events.start, now.start))
        packed = self._half_empty(by_slot, now.start - 1)
        moved = self._enter(by_slot, page_list, now)
        if not moved:
            return None
        parts = zip(*moved, strict=True)
        lane, page, event, ids = (np.concatenate(part) for part in parts)
        if not (self._plan.is_shared or self._plan.lookahead):
            # Nobody will start with pages that a later event of this step fills, or
            # go back to them.
            last = event == now.stop - 1
            whole = (page + 1) * self._plan.page_size <= event * self._keep.flat[lane]
            lane, page, event, ids = (x[last | whole] for x in (lane, page, event, ids))
        sources, targets = self._moves(lane, page, event, ids, now)
        plan, size = self._plan, self._plan.page_size
        begin = plan.history.group_of(now.start)
        raw = by_slot[:, :, begin : begin + len(now) * plan.group].copy()
        first = begin * size
        of_groups = raw, packed, self._keep, first, len(now), size
        return Leaving(*of_groups, sources, targets, plan.spans)

    def _half_empty(self, by_slot: PageArray, events: int) -> PageArray:
        """The page in which each lane's history ends, unless it is full."""
        page, rest = np.divmod(events * self._keep, self._plan.page_size)
        columns = np.where(rest > 0, self._column + page, 0)
        ends = np.take_along_axis(by_slot, columns[..., None], axis=2)[..., 0]
        found: PageArray = np.where(rest > 0, ends, 0)
        return found

    def _enter(
        self, by_slot: PageArray, page_list: PageArray, events: range
    ) -> list[tuple[IntArray, ...]]:
        """Enter the pages that events open; return them, as :meth:`_pages_of`."""
        found = [self._pages_of(event, page_list) for event in events]
        for lane, page, _, ids in found:
            layer, head = np.divmod(lane, self._plan.num_kv_heads)
            by_slot[layer, head, self._column + page] = ids
        return [pages for pages in found if len(pages[0])]

    def _pages_of(self, event: int, page_list: PageArray) -> tuple[IntArray, ...]:
        """Lane, number, event and id of each page that an event opens."""
        lane, page = self._plan.history.pages_of(event)
        ids = page_list[self._plan.page_list.packed(event)].astype(np.int64)
        return lane, page, np.full_like(lane, event), ids

    def _moves(
        self,
        lane: IntArray,
        page: IntArray,
        event: IntArray,
        ids: IntArray,
        now: range,
    ) -> tuple[list[IntArray], list[IntArray]]:
        """What goes where, of each layer."""
        size, heads = self._plan.page_size, self._plan.num_kv_heads
        layer, head = np.divmod(lane, heads)
        keep = self._keep.flat[lane][:, None]
        most = self._keep.max(axis=1)[layer][:, None]
        places = np.arange(size)
        token = np.minimum(page[:, None] * size + places, event[:, None] * keep - 1)
        before = now.start - 1
        group, rank = np.divmod(token, np.maximum(keep, 1))
        kept = (head[:, None] * len(now) + group - before) * most + rank
        packed = head[:, None] * size + token % size
        source = np.where(token < before * keep, packed, heads * size + kept)
        target = ids[:, None] * size + places
        of_layer = [layer == one for one in range(self._plan.num_layers)]
        return (
            [source[rows].ravel() for rows in of_layer],
            [target[rows].ravel() for rows in of_layer],
        )
