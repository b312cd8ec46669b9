# SPDX-License-Identifier: Apache-2.0
"""Keys of a small norm stay (Devoto et al., arXiv 2406.11430, section 4).

The paper finds that attention goes to keys whose L2 norm is low. There the whole cache
is ranked at once; here each group is ranked by itself, when it leaves the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from policies.base import Capabilities, ModelShape
from policies.thinning import THINNING, Groups, ThinningPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KNorm(ThinningPolicy):
    """Of what leaves the window, the tokens with the shortest keys stay."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "L2 norm of keys, arXiv 2406.11430"
    capabilities: ClassVar[Capabilities] = THINNING

    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        norm: Tensor = groups.keys.norm(dim=-1)
        return -norm
