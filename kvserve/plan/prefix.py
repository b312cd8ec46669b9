# SPDX-License-Identifier: Apache-2.0
"""Which pages of a common prefix a request needs, and which it gives back.

Under a policy of positions the cache after ``n`` tokens depends on the first ``n``
tokens alone, so a request may start with pages that another one has filled. It starts
at a *boundary*, the first token of a block: what its next query sees of the blocks
before must be there, of every lane, and nothing else need be. In a full lane these are
all blocks, in a bounded one sinks, shards and the window.

A page that a hash names is never written over. Hence blocks recycle no pages here:
each opens a page in every lane, entry ``block * width + place`` of the page list, and
pages that no later query sees are given back to the pool, where they serve other
requests until they are given out again. A page is written only while its block is
being filled; it is named when the block is full and boundaries lie behind full blocks,
so no request is ever given a page that is still to be written by another step.

A *place* is a lane's number on its rank. All ranks use one page list, so a page is
needed as long as any rank needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvserve.plan.page_plan import PagePlan

_FOREVER = 1 << 40
"""A query that has left every window behind."""


class PrefixPages:
    """What requests with one plan need of a prefix.

    Attributes:
        width: entries of the page list for each block: the lanes of a rank.
        window: blocks that the longest window holds.
    """

    def __init__(self, plan: PagePlan) -> None:
        assert plan.is_shared
        self._plan = plan
        self.width = plan.num_layers * plan.heads_per_rank
        ranks = plan.by_rank
        windows = np.max([rank.lanes.window for rank in ranks], axis=0).ravel()
        aligned = ranks[0].lanes.aligned.ravel()
        self.window = plan.longest_window
        self._reaching = [
            np.flatnonzero((windows > distance) & ~aligned).tolist()
            for distance in range(self.window)
        ]
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

    def staying(self, block: int) -> Sequence[int]:
        """Places of lanes that keep ``block`` for good."""
        beyond = block - self._settled
        if beyond >= 0:
            block = self._settled + beyond % self._plan.stride
        places: list[int] = self._staying[block]
        return places

    def reaching(self, block: int, boundary: int) -> Sequence[int]:
        """Places of lanes whose window reaches from ``boundary`` back to ``block``."""
        distance = boundary - block
        places: list[int] = self._reaching[distance] if distance < self.window else []
        for chunk, own in self._chunks.items():
            if block >= boundary - boundary % chunk:
                places = places + own
        return places
