# SPDX-License-Identifier: Apache-2.0
"""Which page holds which slot of which lane, for the requests of the running batch.

The tables live as long as the engine and are touched only where pages changed: a
decode step that opens no block leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvserve.plan import IntArray, PagePlan, blocks_of

PageArray = npt.NDArray[np.int32]


class PageTables:
    """Page ids by batch row, layer and KV head.

    Attributes:
        by_slot: page of each slot, ``[num_layers, rows, num_kv_heads, width]``.
        ordered: pages in the order in which a decode row reads them, the open page
            last, same shape. Without bounded lanes it is ``by_slot`` itself.
        open_page: page being filled, ``[num_layers, rows, num_kv_heads]``.
    """

    def __init__(self, plan: PagePlan, max_requests: int, max_tokens: int) -> None:
        self._plan = plan
        width = blocks_of(max_tokens, plan.page_size)
        shape = (plan.num_layers, max_requests, plan.num_kv_heads, width)
        self.by_slot: PageArray = np.zeros(shape, dtype=np.int32)
        self.ordered: PageArray = self.by_slot
        if plan.has_bounded_lanes:
            self.ordered = np.zeros(shape, dtype=np.int32)
        self.open_page: PageArray = np.zeros(shape[:3], dtype=np.int32)
        self._bounded_width = min(plan.bounded_width, width)
        self._bounded = plan.window_array > 0
        self._requests: list[str] = []
        self._blocks: IntArray = np.zeros(max_requests, dtype=np.int64)
        self._restarted: set[str] = set()

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is known of requests whose page lists start anew.

        A preempted request may come back in the very next step under its old name
        with other pages, so names alone do not tell.
        """
        self._restarted.update(request_ids)

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
        for row in np.flatnonzero(blocks != self._blocks[: len(blocks)]):
            self._update_row(int(row), page_lists[row], int(blocks[row]))

    def _match_rows(self, request_ids: list[str]) -> None:
        known = self._requests + [""] * (len(request_ids) - len(self._requests))
        for row, (new, old) in enumerate(zip(request_ids, known, strict=False)):
            if new != old or new in self._restarted:
                self._blocks[row] = 0
        self._requests = list(request_ids)
        self._restarted.clear()

    def _update_row(self, row: int, page_list: PageArray, blocks: int) -> None:
        plan = self._plan
        opened = np.arange(self._blocks[row], blocks)
        slot = np.broadcast_to(opened, (*plan.capacity.shape, len(opened)))
        has_slot = slot < plan.capacity[..., None]
        index = plan.list_index(np.minimum(slot, plan.capacity[..., None] - 1))
        new = np.where(has_slot, page_list[np.where(has_slot, index, 0)], 0)
        by_slot = self.by_slot[:, row]
        by_slot[:, :, opened] = new
        self._blocks[row] = blocks
        if self.ordered is not self.by_slot:
            self._order_row(row, opened, new, blocks - 1)
        open_slot = plan.slot_of(np.array([blocks - 1]))
        self.open_page[:, row] = np.take_along_axis(by_slot, open_slot, 2)[..., 0]

    def _order_row(self, row: int, opened: IntArray, new: PageArray, last: int) -> None:
        """Append to full lanes, list bounded lanes anew: they are short."""
        plan, width = self._plan, self._bounded_width
        ordered = self.ordered[:, row]
        ordered[:, :, opened] = new
        visible = plan.visible_blocks(np.array([last]))[:, :, 0, :width]
        slot = plan.slot_of(np.maximum(visible, 0))
        listed = np.take_along_axis(self.by_slot[:, row], slot, 2)
        ordered[:, :, :width] = np.where(
            self._bounded[..., None], listed, ordered[:, :, :width]
        )
