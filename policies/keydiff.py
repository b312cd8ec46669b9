# SPDX-License-Identifier: Apache-2.0
"""Keys that differ from the others stay (KeyDiff, arXiv 2504.15364, section 3).

A key's score is how little it resembles the mean of all directions of keys. The paper
takes that mean over the whole cache, and evicts whenever a block of the prompt has been
read; here it is the mean of the group, so that what stays follows from the group alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from policies.base import Capabilities, ModelShape
from policies.thinning import THINNING, Groups, ThinningPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyDiff(ThinningPolicy):
    """Of what leaves the window, the tokens with the most unusual keys stay."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    capabilities: ClassVar[Capabilities] = THINNING

    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        return unlikeness(groups.keys)


def unlikeness(keys: Tensor) -> Tensor:
    """How little keys ``[n, H_kv, G, d]`` resemble the mean direction of their group.

    Returns:
        ``[n, H_kv, G]``, between -1 and 1.
    """
    from torch.nn.functional import cosine_similarity, normalize

    directions = normalize(keys, dim=-1)
    return -cosine_similarity(keys, directions.mean(2, keepdim=True), dim=-1)
