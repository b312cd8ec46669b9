# SPDX-License-Identifier: Apache-2.0
"""Where a request's page list has the page of a lane's slot, and how long it is.

When a block is opened, each lane that has a slot of its number gets one page, in the
order of lanes. Behind the pages of a block come those of an event that its last token
brings: see ``kvserve.plan.history``.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from kvserve.plan.history import History
from kvserve.plan.lanes import BoolArray, IntArray, Lanes


class PageList:
    """Of the lanes of one rank, ``[num_layers, num_kv_heads]``."""

    def __init__(self, lanes: Lanes, history: History) -> None:
        self._lanes, self._history = lanes, history
        self._shape = lanes.window.shape
        self._num_lanes = lanes.window.size
        bounded = lanes.window > 0
        turn = lanes.stride if lanes.stride > 1 else 0
        filled = lanes.sinks + lanes.window + turn
        # Blocks after which the lanes open slots in turns of ``stride`` blocks.
        self._warm_up = int(filled[bounded].max(initial=0))

    @cached_property
    def _opened(self) -> BoolArray:
        """Which lanes open a slot with each block, ``[num_lanes, blocks]``.

        One turn behind the warm-up; all later turns repeat it.
        """
        blocks = np.arange(self._warm_up + self._lanes.stride)
        opens = self._lanes.opens(blocks)
        opened = np.broadcast_to(opens, (*self._shape, len(blocks)))
        return opened.reshape(self._num_lanes, -1)

    @cached_property
    def _listed(self) -> list[int]:
        """Pages listed when the first ``b`` blocks are open, till the turn's end."""
        listed: list[int] = [0, *self._opened.sum(axis=0).cumsum().tolist()]
        return listed

    @property
    def _pages_per_turn(self) -> int:
        return self._listed[-1] - self._listed[self._warm_up]

    @cached_property
    def _entry(self) -> IntArray:
        """List index of what each lane opens, as :attr:`_opened`, else undefined."""
        counts = self._opened.T.ravel().cumsum()
        entry: IntArray = counts.reshape(-1, self._num_lanes).T - 1
        return entry

    def length(self, blocks: int, begun: int) -> int:
        """Entries of ``blocks`` blocks, ``begun`` of which were full.

        Args:
            begun: the block that the next query is in.
        """
        turns = max(0, blocks - self._warm_up) // self._lanes.stride
        listed = self._listed[blocks - turns * self._lanes.stride]
        packed = self._history.total(self._history.events(begun))
        return listed + turns * self._pages_per_turn + packed

    def index(self, slot: IntArray) -> IntArray:
        """Index of each lane's ``slot``.

        Args:
            slot: slots that the lanes have opened, ``[num_layers, num_kv_heads, n]``.

        Returns:
            Indices of the same shape.
        """
        turns = np.maximum(slot - self._warm_up, 0) // self._lanes.stride
        first = (slot - turns * self._lanes.stride).reshape(self._num_lanes, -1)
        entry = np.take_along_axis(self._entry, first, axis=1).reshape(slot.shape)
        index: IntArray = entry + turns * self._pages_per_turn
        if self._history.group:
            index += self._history.entries(self._history.events_of_each(slot))
        return index

    def first_of(self, event: int) -> int:
        """Index of the first page that an event opens."""
        history = self._history
        return history.block_of(event) * self._num_lanes + history.total(event - 1)

    def packed(self, event: int) -> IntArray:
        """Indices of the pages that an event opens, as ``History.pages_of``."""
        lanes, _ = self._history.pages_of(event)
        entries: IntArray = np.arange(len(lanes)) + self.first_of(event)
        return entries
