# SPDX-License-Identifier: Apache-2.0
"""Which page holds which slot of which lane, for the requests of the running batch.

The tables live as long as the engine and are touched only where pages changed: a
decode step that opens no block leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvserve.engine.batch.leaving import HistoryPages, Leaving
from kvserve.engine.batch.settled import SettledRows
from kvserve.plan.blocks import blocks_of
from kvserve.plan.dense import DensePlan
from kvserve.plan.lanes import IntArray, Lanes, PageArray
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.rule import RequestPlan, Rule


class PageTables:
    """Page ids by batch row, layer and KV head.

    Attributes:
        lanes: what each row's lanes keep, ``[num_layers, rows, num_kv_heads]``.
        by_slot: page of each slot, ``[num_layers, rows, num_kv_heads, width]``. Behind
            all slots are history pages, from column ``history`` on.
        ordered: pages in the order in which a decode row reads them, the open page
            last, as wide as there are slots. Without bounded lanes it is ``by_slot``.
        open_page: page being filled, ``[num_layers, rows, num_kv_heads]``; of settled
            rows ``settled`` tells.
        settled: rows whose lanes have lengths of their own.
        local_layers: those whose queries do not see everything by the model itself.
        leaving: groups that leave the window in this step, in the order to pack them.
        changed: rows whose pages have changed, until somebody clears it.

    Args:
        plan: of every request, unless there is a rule; of them all, in shape.
        rule: under which requests have plans of their own.
        rank: whose heads these are, among the plan's ranks.
    """

    def __init__(
        self,
        plan: PagePlan,
        max_requests: int,
        max_tokens: int,
        rule: Rule | None = None,
        rank: int = 0,
    ) -> None:
        plan = plan.of_rank(rank)
        self._plan, self._rule, self._rank = plan, rule, rank
        self.history = width = blocks_of(max_tokens, plan.page_size)
        packed = (rule or plan).history_pages(max_tokens)
        shape = (plan.num_layers, max_requests, plan.num_kv_heads)
        self.lanes = Lanes.full(shape, plan.stride)
        if plan.group:
            nothing = np.zeros(shape, dtype=np.int64)
            self.lanes = self.lanes.thinned(nothing, nothing.copy(), plan.page_size)
        self.by_slot: PageArray = np.zeros((*shape, width + packed), dtype=np.int32)
        self.ordered: PageArray = self.by_slot
        if (rule or plan).has_bounded_lanes:
            self.ordered = np.zeros((*shape, width), dtype=np.int32)
        self.open_page: PageArray = np.zeros(shape, dtype=np.int32)
        self.settled = SettledRows(shape, plan.page_size)
        self.local_layers = frozenset(i for i, one in enumerate(plan.local) if one)
        self.leaving: list[Leaving] = []
        self.changed: set[int] = set()
        self._plans: dict[str, RequestPlan] = {}
        self._named: dict[str, Rule] = {}
        self._requests: list[str] = []
        self._blocks: IntArray = np.zeros(max_requests, dtype=np.int64)
        self._events: IntArray = np.zeros(max_requests, dtype=np.int64)
        self._restarted: set[str] = set()

    @property
    def thins(self) -> bool:
        """Whether a lane of some request is thinned."""
        return self.lanes.page_size > 0

    def expect(
        self,
        request_id: str,
        prompt_tokens: int,
        reply_tokens: int,
        named: Rule | None = None,
    ) -> None:
        """Note a new request: its prompt, and the longest reply it may get.

        Args:
            named: the request's own rule, if it has one.
        """
        rule = named or self._rule
        if rule is not None:
            plan = rule.of_request(prompt_tokens, reply_tokens)
            self._plans[request_id] = plan.of_rank(self._rank)
        if named is not None:
            self._named[request_id] = named

    def plan_of(self, request_id: str) -> RequestPlan:
        """Return the plan of a request, on this rank."""
        return self._plan if self._rule is None else self._plans[request_id]

    def settle(self, request_id: str, plan: DensePlan, lane_of_head: IntArray) -> None:
        """Note that the survivors of a request have moved.

        Args:
            lane_of_head: each head's lane in its layer, ``[num_layers, num_kv_heads]``.
        """
        self.settled.add(request_id, plan, lane_of_head)
        self._restarted.add(request_id)

    def finish(self, request_ids: Sequence[str]) -> None:
        """Drop requests that will not come back."""
        for request_id in request_ids:
            self._plans.pop(request_id, None)
            self._named.pop(request_id, None)
            self.settled.drop(request_id)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is known of requests whose page lists start anew.

        A preempted request may come back in the very next step under its old name
        with other pages, so names alone do not tell.
        """
        self._restarted.update(request_ids)
        for request_id in request_ids:
            self.settled.drop(request_id)

    def refresh(
        self,
        request_ids: list[str],
        page_lists: PageArray,
        seq_lens: IntArray,
        computed: IntArray,
    ) -> None:
        """Bring the tables up to date with the batch of this step.

        Args:
            request_ids: the batch's requests, in row order.
            page_lists: page list of each row, ``[>= rows, pages]``.
            seq_lens: tokens of each row when the step is done, ``[rows]``.
            computed: tokens of each row when it begins, ``[rows]``.
        """
        if request_ids != self._requests or self._restarted:
            self._match_rows(request_ids)
        blocks = (seq_lens - 1) // self._plan.page_size + 1
        grown = blocks != self._blocks[: len(blocks)]
        if self.settled:
            grown &= ~self.settled.rows[: len(blocks)]
        opened = np.flatnonzero(grown).tolist()
        for row in opened:
            self._open_blocks(row, page_lists[row], int(blocks[row]))
            self.changed.add(row)
        if self.thins:
            self._let_leave(page_lists, seq_lens, computed)
        for row in opened:
            self._order_row(row)
        for row, before, now in self.settled.opened(seq_lens):
            self._place_settled(row, page_lists[row], before, now)
            self.changed.add(row)

    def _let_leave(
        self, page_lists: PageArray, seq_lens: IntArray, computed: IntArray
    ) -> None:
        """Enter the history pages of groups that leave."""
        self.leaving.clear()
        size = self._plan.page_size
        for row, (tokens, before) in enumerate(
            zip((seq_lens // size).tolist(), (computed // size).tolist(), strict=True)
        ):
            plan = self.plan_of(self._requests[row]).reading
            due, settled = plan.history.events(tokens), plan.history.events(before)
            # What refused tokens brought is brought anew: it may have held some.
            done = self._events[row] = min(int(self._events[row]), settled)
            if due <= done:
                continue
            self._events[row] = due
            left = HistoryPages(plan, self.history).place(
                self.by_slot[:, row],
                page_lists[row],
                range(done + 1, due + 1),
                settled,
            )
            if left is not None:
                named = self._named.get(self._requests[row])
                policy = None if named is None else named.policy
                self.leaving.append(replace(left, policy=policy))
            self.changed.add(row)
        # Who starts with what another packs in this very step packs behind him.
        self.leaving.sort(key=lambda left: left.first)

    def _match_rows(self, request_ids: list[str]) -> None:
        known = self._requests + [""] * (len(request_ids) - len(self._requests))
        for row, (new, old) in enumerate(zip(request_ids, known, strict=False)):
            if new != old or new in self._restarted:
                self._blocks[row] = self._events[row] = 0
                self.lanes.put(row, self.plan_of(new).reading.lanes)
                self.settled.place(row, new)
        self._requests = list(request_ids)
        self._restarted.clear()

    def _open_blocks(self, row: int, page_list: PageArray, blocks: int) -> None:
        plan = self.plan_of(self._requests[row]).reading
        opened = np.arange(self._blocks[row], blocks)
        shape = plan.num_layers, plan.num_kv_heads, len(opened)
        index = plan.page_list.index(np.broadcast_to(opened, shape))
        has_slot = np.broadcast_to(plan.lanes.opens(opened), shape)
        new = np.where(has_slot, page_list[np.where(has_slot, index, 0)], 0)
        by_slot = self.by_slot[:, row]
        by_slot[:, :, opened] = new
        self._blocks[row] = blocks
        if self.ordered is not self.by_slot:
            self.ordered[:, row][:, :, opened] = new
        open_slot = plan.lanes.slot_of(np.array([blocks - 1]))
        self.open_page[:, row] = np.take_along_axis(by_slot, open_slot, 2)[..., 0]

    def _place_settled(
        self, row: int, page_list: PageArray, before: int, now: int
    ) -> None:
        """Put new pages of a settled row in their slots, in which they are read."""
        name = self._requests[row]
        layer, head, slot, entry = self.settled.new_entries(name, before, now)
        self.by_slot[layer, row, head, slot] = page_list[entry]
        self.ordered[layer, row, head, slot] = page_list[entry]

    def next_slots(self, seq_lens: IntArray) -> IntArray:
        """Where the last token of each row goes: pages times tokens of a page.

        Returns:
            ``[num_layers, len(seq_lens), num_kv_heads]``.
        """
        size, rows = self._plan.page_size, slice(len(seq_lens))
        place = ((seq_lens - 1) % size)[:, None]
        slots: IntArray = self.open_page[:, rows].astype(np.int64) * size + place
        if self.settled:
            settled = np.flatnonzero(self.settled.rows[rows])
            token = self.settled.last_token(seq_lens)[:, settled]
            by_slot = self.by_slot[:, settled]
            page = np.take_along_axis(by_slot, (token // size)[..., None], axis=3)
            slots[:, settled] = page[..., 0].astype(np.int64) * size + token % size
        return slots

    def tokens_seen(self, seq_lens: IntArray) -> IntArray:
        """Tokens that the last one of each row sees in each lane, shaped alike."""
        size, rows = self._plan.page_size, len(seq_lens)
        block = (seq_lens - 1) // size
        hidden = self.lanes.first_rows(rows).hidden(block[:, None, None])[..., 0]
        seen: IntArray = seq_lens[:, None] - hidden * size
        if self.settled:
            # Lanes of settled rows are laid out as full ones: nothing is hidden.
            seen = np.minimum(seen, self.settled.lane_tokens(seq_lens))
        return seen

    def gaps(self, seq_lens: IntArray) -> IntArray | None:
        """Keys of each lane that the last token of each row does not see.

        Returns:
            First one and first behind, ``[num_layers, rows, num_kv_heads, 2]``; nothing
            where no lane is thinned.
        """
        if not self.thins:
            return None
        block = (seq_lens - 1) // self._plan.page_size
        lanes = self.lanes.first_rows(len(seq_lens))
        gaps: IntArray = lanes.gap(block[:, None, None])[..., 0, :]
        return gaps

    def _order_row(self, row: int) -> None:
        """List bounded lanes anew: they are short. Full ones are in order."""
        if self.ordered is self.by_slot:
            return
        ordered, last = self.ordered[:, row], int(self._blocks[row]) - 1
        lanes = self.plan_of(self._requests[row]).reading.lanes
        bounded = lanes.window > 0
        if not bounded.any():
            return
        block = np.array([last])
        seen = np.broadcast_to(last + 1 - lanes.hidden(block)[..., 0], bounded.shape)
        width = int(seen[bounded].max())
        visible = lanes.visible(block, width, self.history)[..., 0, :]
        slot = lanes.slot_of(np.maximum(visible, 0))
        listed = np.take_along_axis(self.by_slot[:, row], slot, 2)
        ordered[:, :, :width] = np.where(
            bounded[..., None], listed, ordered[:, :, :width]
        )
