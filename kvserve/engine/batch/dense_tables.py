# SPDX-License-Identifier: Apache-2.0
"""Page tables and rows of requests that hold all pages till a prompt is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvserve.engine.batch.page_tables import PageArray, PageTables
from kvserve.engine.batch.rows import RowBuilder
from kvserve.plan.dense import DensePlan, DenseRule, blocks_of_each
from kvserve.plan.lanes import IntArray
from kvserve.plan.page_plan import UNBOUNDED, PagePlan, blocks_of
from kvserve.plan.streaming import StreamRule


class DenseTables(PageTables):
    """Page ids by batch row, layer and KV head, of full and of settled requests.

    A request is *settled* once its survivors have moved: from then on its lanes have
    lengths of their own. All arrays have shape ``[num_layers, rows, num_kv_heads]``.

    Attributes:
        dropped: prompt tokens that a lane let go; 0 until the request is settled.
        capacity: tokens that a lane can hold.
        ring: last tokens that are recycled in turn, or 0.
        heavy: lanes whose full slots are recycled by score.
        protected: last tokens that are safe from that.
    """

    def __init__(self, rule: DenseRule, max_requests: int, max_tokens: int) -> None:
        super().__init__(rule.full, max_requests, max_tokens)
        self._dense_rule = rule
        shape = self.open_page.shape
        self.dropped: IntArray = np.zeros(shape, dtype=np.int64)
        self.capacity: IntArray = np.full(shape, UNBOUNDED, dtype=np.int64)
        self.ring: IntArray = np.zeros(shape, dtype=np.int64)
        self.heavy = np.zeros(shape, dtype=bool)
        self.protected: IntArray = np.zeros(shape, dtype=np.int64)
        self._held: IntArray = np.zeros(max_requests, dtype=np.int64)
        self._dense_plans: dict[str, DensePlan] = {}
        self._lane_of_head: dict[str, IntArray] = {}

    @property
    def full_plan(self) -> PagePlan:
        return self._plan

    def expect(
        self,
        request_id: str,
        prompt_tokens: int,
        reply_tokens: int,
        named: StreamRule | None = None,
    ) -> None:
        assert named is None, "dense policies are not mixed with others"
        plan = self._dense_rule.of_request(prompt_tokens, reply_tokens)
        self._dense_plans[request_id] = plan

    def plan_of(self, request_id: str) -> DensePlan:
        return self._dense_plans[request_id]

    @property
    def lane_of_head(self) -> dict[str, IntArray]:
        """Each head's lane in its layer, of settled requests."""
        return dict(self._lane_of_head)

    def is_settled(self, request_id: str) -> bool:
        return request_id in self._lane_of_head

    def settle(self, request_id: str, lane_of_head: IntArray) -> None:
        """Note that survivors have moved.

        Args:
            lane_of_head: each head's lane in its layer, ``[num_layers, num_kv_heads]``.
        """
        self._lane_of_head[request_id] = lane_of_head
        self._restarted.add(request_id)

    def forget(self, request_ids: Sequence[str]) -> None:
        super().forget(request_ids)
        for request_id in request_ids:
            self._lane_of_head.pop(request_id, None)

    def finish(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._lane_of_head.pop(request_id, None)
            self._dense_plans.pop(request_id, None)

    def refresh(
        self, request_ids: list[str], page_lists: PageArray, seq_lens: IntArray
    ) -> None:
        if request_ids != self._requests or self._restarted:
            self._match_rows(request_ids)
        blocks = blocks_of_each(self.lane_tokens(seq_lens), self._plan.page_size)
        held = blocks.sum(axis=(0, 2))
        for row in np.flatnonzero(held != self._held[: len(held)]):
            self._fill(int(row), page_lists[row], int(seq_lens[row]), int(held[row]))

    def lane_tokens(self, seq_lens: IntArray) -> IntArray:
        """Tokens in each lane, ``[num_layers, len(seq_lens), num_kv_heads]``."""
        rows = slice(len(seq_lens))
        tokens = seq_lens[:, None] - self.dropped[:, rows]
        held: IntArray = np.minimum(tokens, self.capacity[:, rows])
        return held

    def next_slots(self, seq_lens: IntArray) -> tuple[IntArray, IntArray]:
        """Page and place in it of each row's last token, lane by lane.

        Full heavy lanes have no meaning here: the scores of their tokens decide.
        """
        rows, size = slice(len(seq_lens)), self._plan.page_size
        token = self.lane_tokens(seq_lens) - 1
        ring = self.ring[:, rows]
        # Tokens that came when their lane was full, this one included.
        over = seq_lens[:, None] - self.dropped[:, rows] - self.capacity[:, rows]
        turn = token + 1 - ring + (over - 1) % np.maximum(ring, 1)
        token = np.where((ring > 0) & (over > 0), turn, token)
        slot = (token // size)[..., None]
        page = np.take_along_axis(self.by_slot[:, rows], slot, axis=3)[..., 0]
        return page.astype(np.int64), token % size

    def _match_rows(self, request_ids: list[str]) -> None:
        super()._match_rows(request_ids)
        for row in np.flatnonzero(self._blocks[: len(request_ids)] == 0):
            self._held[row] = 0
            self._lay_out(int(row), request_ids[row])

    def _lay_out(self, row: int, request_id: str) -> None:
        plan = self._dense_plans[request_id]
        lane_of_head = self._lane_of_head.get(request_id)
        if lane_of_head is None:
            self.dropped[:, row], self.capacity[:, row] = 0, UNBOUNDED
            self.ring[:, row], self.heavy[:, row] = 0, False
            return
        for array, value in (
            (self.dropped, plan.prompt_tokens - plan.keep),
            (self.capacity, plan.capacity),
            (self.ring, plan.ring),
            (self.heavy, plan.heavy),
            (self.protected, plan.protected),
        ):
            array[:, row] = np.take_along_axis(value, lane_of_head, axis=1)
        # Rows that are not laid out anew count by `_held`, not by `_blocks`.
        self._blocks[row] = -1

    def _fill(self, row: int, page_list: PageArray, tokens: int, held: int) -> None:
        request_id, before = self._requests[row], int(self._held[row])
        self._held[row] = held
        lane_of_head = self._lane_of_head.get(request_id)
        if lane_of_head is None:
            self._update_row(row, page_list, blocks_of(tokens, self._plan.page_size))
            return
        plan = self._dense_plans[request_id]
        kept = plan.kept_entries
        if before == 0:
            self._place(row, lane_of_head, plan.kept_slots, page_list[:kept])
        opened = slice(max(before - kept, 0), held - kept)
        lane, slot = plan.opened_slots
        behind = page_list[plan.prompt_entries :][opened]
        self._place(row, lane_of_head, (lane[opened], slot[opened]), behind)

    def _place(
        self,
        row: int,
        lane_of_head: IntArray,
        slots: tuple[IntArray, IntArray],
        pages: PageArray,
    ) -> None:
        lane, slot = slots
        layer, lane_in_layer = np.divmod(lane, lane_of_head.shape[1])
        head = np.argsort(lane_of_head, axis=1)[layer, lane_in_layer]
        self.by_slot[layer, row, head, slot] = pages


class DenseRowBuilder(RowBuilder):
    """Rows of full caches in prefill, of settled lanes in decode."""

    def __init__(self, tables: DenseTables) -> None:
        super().__init__(tables.full_plan, tables)
        self._dense = tables

    def _decode_lens(self, seq_lens: IntArray) -> IntArray:
        tokens = self._dense.lane_tokens(seq_lens)
        return tokens.reshape(len(tokens), -1)

    def _decode_slots(self, seq_lens: IntArray) -> IntArray:
        page, place = self._dense.next_slots(seq_lens)
        slots = page * self._plan.page_size + place
        return slots.reshape(len(slots), -1)
