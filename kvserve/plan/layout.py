# SPDX-License-Identifier: Apache-2.0
"""How heads of unequal number and size lie in pages of one size.

All pages of a pool have room for 32 tokens of the largest head of any layer. A page of
a layer with smaller heads is as many smaller pages, and if its heads keep the same, as
those of a local layer do, they lie in one page side by side: nothing is wasted, and the
*lanes* of a layer are fewer than its heads. Where a policy decides head by head, each
has a lane of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvserve.plan.lanes import IntArray
from policies.base import ModelShape


@dataclass(frozen=True)
class LayerHeads:
    """The KV heads of one layer.

    Attributes:
        kv_heads: how many they are.
        per_page: heads that a page has room for.
        together: whether that many share a page.
    """

    kv_heads: int
    per_page: int
    together: bool

    @property
    def num_lanes(self) -> int:
        return -(-self.kv_heads // self.per_page) if self.together else self.kv_heads

    @cached_property
    def lane_of_head(self) -> IntArray:
        """The lane of each head, ``[kv_heads]``."""
        heads = np.arange(self.kv_heads)
        return heads // self.per_page if self.together else heads

    @cached_property
    def place_of_head(self) -> IntArray:
        """Which of the smaller pages of a page is a head's, ``[kv_heads]``."""
        heads = np.arange(self.kv_heads)
        return heads % self.per_page if self.together else np.zeros_like(heads)

    def pages(self, by_lane: IntArray) -> IntArray:
        """Turn pages of lanes, ``[..., lanes]``, into smaller pages of heads."""
        pages: IntArray = by_lane[..., self.lane_of_head] * self.per_page
        return pages + self.place_of_head


def layout_of(model: ModelShape) -> tuple[LayerHeads, ...]:
    """How the heads of each layer lie in pages; empty if all layers are alike."""
    if not model.layer_heads:
        return ()
    layers = zip(model.layer_heads, model.local_by_layer, strict=True)
    return tuple(
        LayerHeads(heads, model.head_size // size, together=local is not None)
        for (heads, size), local in layers
    )
