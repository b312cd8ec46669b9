# SPDX-License-Identifier: Apache-2.0
"""Which page holds which slot of which lane, for the requests of the running batch.

The tables live as long as the engine and are touched only where pages changed: a
decode step that opens no block leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvserve.engine.batch.settled import SettledRows
from kvserve.plan.blocks import blocks_of
from kvserve.plan.dense import DensePlan
from kvserve.plan.lanes import IntArray, Lanes
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.rule import RequestPlan, Rule

PageArray = npt.NDArray[np.int32]


class PageTables:
    """Page ids by batch row, layer and KV head.

    Attributes:
        lanes: what each row's lanes keep, ``[num_layers, rows, num_kv_heads]``.
        by_slot: page of each slot, ``[num_layers, rows, num_kv_heads, width]``.
        ordered: pages in the order in which a decode row reads them, the open page
            last, same shape. Without bounded lanes it is ``by_slot`` itself.
        open_page: page being filled, ``[num_layers, rows, num_kv_heads]``; of settled
            rows ``settled`` tells.
        settled: rows whose lanes have lengths of their own.
        local_layers: those whose queries do not see everything by the model itself.
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
        width = blocks_of(max_tokens, plan.page_size)
        shape = (plan.num_layers, max_requests, plan.num_kv_heads, width)
        self.lanes = Lanes.full(shape[:3], plan.stride)
        self.by_slot: PageArray = np.zeros(shape, dtype=np.int32)
        self.ordered: PageArray = self.by_slot
        if (rule or plan).has_bounded_lanes:
            self.ordered = np.zeros(shape, dtype=np.int32)
        self.open_page: PageArray = np.zeros(shape[:3], dtype=np.int32)
        self.settled = SettledRows(shape[:3], plan.page_size)
        self.local_layers = frozenset(i for i, one in enumerate(plan.local) if one)
        self.changed: set[int] = set()
        self._plans: dict[str, RequestPlan] = {}
        self._requests: list[str] = []
        self._blocks: IntArray = np.zeros(max_requests, dtype=np.int64)
        self._restarted: set[str] = set()

    def expect(
        self,
        request_id: str,
        prompt_tokens: int,
        reply_tokens: int,
        named: Rule | None = None,
    ) -> None:
        """Note a new request: its prompt, and the longest reply it may get.

        Args:
            named: the rule under the policy that it names, if it names one.
        """
        rule = named or self._rule
        if rule is not None:
            plan = rule.of_request(prompt_tokens, reply_tokens)
            self._plans[request_id] = plan.of_rank(self._rank)

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
        self, request_ids: list[str], page_lists: PageArray, seq_lens: IntArray
    ) -> None:
        """Bring the tables up to date with the batch of this step.

        Args:
            request_ids: the batch's requests, in row order.
            page_lists: page list of each row, ``[>= rows, pages]``.
            seq_lens: tokens of each row when the step is done, ``[rows]``.
        """
        if request_ids != self._requests or self._restarted:
            self._match_rows(request_ids)
        blocks = (seq_lens - 1) // self._plan.page_size + 1
        grown = blocks != self._blocks[: len(blocks)]
        if self.settled:
            grown &= ~self.settled.rows[: len(blocks)]
        for row in np.flatnonzero(grown).tolist():
            self._update_row(row, page_lists[row], int(blocks[row]))
            self.changed.add(row)
        for row, before, now in self.settled.opened(seq_lens):
            self._place_settled(row, page_lists[row], before, now)
            self.changed.add(row)

    def _match_rows(self, request_ids: list[str]) -> None:
        known = self._requests + [""] * (len(request_ids) - len(self._requests))
        for row, (new, old) in enumerate(zip(request_ids, known, strict=False)):
            if new != old or new in self._restarted:
                self._blocks[row] = 0
                self.lanes.put(row, self.plan_of(new).reading.lanes)
                self.settled.place(row, new)
        self._requests = list(request_ids)
        self._restarted.clear()

    def _update_row(self, row: int, page_list: PageArray, blocks: int) -> None:
        plan = self.plan_of(self._requests[row]).reading
        opened = np.arange(self._blocks[row], blocks)
        shape = plan.num_layers, plan.num_kv_heads, len(opened)
        index = plan.list_index(np.broadcast_to(opened, shape))
        has_slot = np.broadcast_to(plan.lanes.opens(opened), shape)
        new = np.where(has_slot, page_list[np.where(has_slot, index, 0)], 0)
        by_slot = self.by_slot[:, row]
        by_slot[:, :, opened] = new
        self._blocks[row] = blocks
        if self.ordered is not self.by_slot:
            self._order_row(row, plan.lanes, opened, new, blocks - 1)
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

    def _order_row(
        self, row: int, lanes: Lanes, opened: IntArray, new: PageArray, last: int
    ) -> None:
        """Append to full lanes, list bounded lanes anew: they are short."""
        ordered = self.ordered[:, row]
        ordered[:, :, opened] = new
        bounded = lanes.window > 0
        if not bounded.any():
            return
        block = np.array([last])
        seen = np.broadcast_to(last + 1 - lanes.hidden(block)[..., 0], bounded.shape)
        width = int(seen[bounded].max())
        visible = lanes.visible(block, width)[..., 0, :]
        slot = lanes.slot_of(np.maximum(visible, 0))
        listed = np.take_along_axis(self.by_slot[:, row], slot, 2)
        ordered[:, :, :width] = np.where(
            bounded[..., None], listed, ordered[:, :, :width]
        )
