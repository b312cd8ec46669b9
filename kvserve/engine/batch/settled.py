# SPDX-License-Identifier: Apache-2.0
"""Batch rows of requests that have selected: their lanes have lengths of their own.

A request is *settled* once its survivors have moved to the front of its page list.
"""

from __future__ import annotations

import numpy as np

from kvserve.plan.blocks import UNBOUNDED
from kvserve.plan.dense import DensePlan, blocks_of_each
from kvserve.plan.lanes import BoolArray, IntArray


class SettledRows:
    """What settled rows have let go and may hold; other rows are as if they had not.

    All arrays have shape ``[num_layers, rows, num_kv_heads]``, but ``rows``.

    Attributes:
        rows: which rows are settled, ``[rows]``.
        dropped: prompt tokens that a lane let go.
        capacity: tokens that a lane can hold.
        ring: last tokens that are recycled in turn, or 0.
        heavy: lanes whose full slots are recycled by score.
        protected: last tokens that are safe from that.
        lane_of_head: each head's lane in its layer, by request, ``[num_layers,
            num_kv_heads]``.
    """

    def __init__(self, shape: tuple[int, ...], page_size: int) -> None:
        self._page_size = page_size
        self.rows: BoolArray = np.zeros(shape[1], dtype=bool)
        self.dropped: IntArray = np.zeros(shape, dtype=np.int64)
        self.capacity: IntArray = np.full(shape, UNBOUNDED, dtype=np.int64)
        self.ring: IntArray = np.zeros(shape, dtype=np.int64)
        self.heavy: BoolArray = np.zeros(shape, dtype=bool)
        self.protected: IntArray = np.zeros(shape, dtype=np.int64)
        self.lane_of_head: dict[str, IntArray] = {}
        self._plans: dict[str, DensePlan] = {}
        # Pages that a row held when it was last looked at.
        self._held: IntArray = np.zeros(shape[1], dtype=np.int64)

    def __bool__(self) -> bool:
        """Whether any request is settled: most servers have none."""
        return bool(self.lane_of_head)

    def add(self, request_id: str, plan: DensePlan, lane_of_head: IntArray) -> None:
        """Note that the survivors of a request have moved."""
        self.lane_of_head[request_id] = lane_of_head
        self._plans[request_id] = plan

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is one of these."""
        self.lane_of_head.pop(request_id, None)
        self._plans.pop(request_id, None)

    def place(self, row: int, request_id: str) -> None:
        """Give a batch row to a request, settled or not."""
        lane_of_head = self.lane_of_head.get(request_id)
        self.rows[row] = lane_of_head is not None
        self._held[row] = 0
        self.heavy[:, row] = False
        if lane_of_head is None:
            return
        plan = self._plans[request_id]
        for array, value in (
            (self.dropped, plan.prompt_tokens - plan.keep),
            (self.capacity, plan.capacity),
            (self.ring, plan.ring),
            (self.heavy, plan.heavy),
            (self.protected, plan.protected),
        ):
            array[:, row] = np.take_along_axis(value, lane_of_head, axis=1)

    def lane_tokens(self, seq_lens: IntArray) -> IntArray:
        """Tokens in each lane, ``[num_layers, len(seq_lens), num_kv_heads]``.

        Of rows that are not settled: all.
        """
        rows, all_tokens = slice(len(seq_lens)), seq_lens[:, None]
        tokens = np.minimum(all_tokens - self.dropped[:, rows], self.capacity[:, rows])
        held: IntArray = np.where(self.rows[rows, None], tokens, all_tokens)
        return held

    def is_full(self, seq_lens: IntArray) -> BoolArray:
        """Which lanes hold less than they were given, shaped like the others."""
        rows = slice(len(seq_lens))
        given = seq_lens[:, None] - self.dropped[:, rows]
        full: BoolArray = (given > self.capacity[:, rows]) & self.rows[rows, None]
        return full

    def opened(self, seq_lens: IntArray) -> list[tuple[int, int, int]]:
        """Settled rows whose pages are more than they were: row, pages before, now."""
        if not self:
            return []
        blocks = blocks_of_each(self.lane_tokens(seq_lens), self._page_size)
        held = np.where(self.rows[: len(seq_lens)], blocks.sum(axis=(0, 2)), 0)
        changed = np.flatnonzero(held > self._held[: len(held)]).tolist()
        found = [(row, int(self._held[row]), int(held[row])) for row in changed]
        self._held[changed] = held[changed]
        return found

    def new_entries(
        self, request_id: str, before: int, now: int
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Where the pages of a request lie that were not there before.

        Args:
            before, now: pages that it held and holds.

        Returns:
            Layer, head, slot and index into the page list of each.
        """
        plan, lane_of_head = self._plans[request_id], self.lane_of_head[request_id]
        kept = plan.kept_entries
        opened = np.arange(max(before - kept, 0), now - kept)
        lane, slot = (part[opened] for part in plan.opened_slots)
        entry = plan.prompt_entries + opened
        if before == 0:
            kept_lane, kept_slot = plan.kept_slots
            lane = np.concatenate([kept_lane, lane])
            slot = np.concatenate([kept_slot, slot])
            entry = np.concatenate([np.arange(kept), entry])
        layer, lane_in_layer = np.divmod(lane, lane_of_head.shape[1])
        head = np.argsort(lane_of_head, axis=1)[layer, lane_in_layer]
        return layer, head, slot, entry

    def last_token(self, seq_lens: IntArray) -> IntArray:
        """Place of each row's last token in its lane, shaped like the others.

        Full heavy lanes have no meaning here: the scores of their tokens decide.
        """
        rows = slice(len(seq_lens))
        token = self.lane_tokens(seq_lens) - 1
        ring = np.where(self.rows[rows, None], self.ring[:, rows], 0)
        # Tokens that came when their lane was full, this one included.
        over = seq_lens[:, None] - self.dropped[:, rows] - self.capacity[:, rows]
        turn = token + 1 - ring + (over - 1) % np.maximum(ring, 1)
        placed: IntArray = np.where((ring > 0) & (over > 0), turn, token)
        return placed
