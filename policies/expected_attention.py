# SPDX-License-Identifier: Apache-2.0
"""What queries to come are expected to look at stays (arXiv 2510.00636, section 3).

Queries of a head, before their rotation, are taken for normally distributed. Their
rotations over the next positions are averaged, and the mean of ``exp(q k / sqrt(d))``
has a closed form. The paper takes mean and covariance from the prompt that is being
read; here they are measured on the model beforehand, and positions to come count from
the end of the group, so that what stays follows from the group alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from policies.base import Capabilities, ModelShape, parameter
from policies.files import follows_files, shipped_or
from policies.tensor_files import MeasuredPolicy, TensorFile
from policies.thinning import THINNING, Groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QUERIES_FORMAT = "kvserve-queries/1"
PARTS = ("mean", "covariance")
"""Of queries before rotation, ``[H_q, d]`` and ``[H_q, d, d]``."""
FREQUENCIES = "frequencies"
"""How rotation turns dimension ``i`` and ``i + r`` of a key, radians a token, ``[r]``:
the same for all layers; dimensions from ``2 r`` on do not turn."""


@dataclass(frozen=True)
class ExpectedAttention(MeasuredPolicy):
    """Of what leaves the window, what queries to come should look at most stays."""

    name: ClassVar[str] = "expected-attention"
    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    capabilities: ClassVar[Capabilities] = THINNING

    queries: str | None = parameter(
        None,
        "file of `kvserve profile scorer` that says how queries are distributed; "
        "without it, the one that ships for the model",
    )
    horizon: int = parameter(
        512, "positions behind a group over which queries are averaged", minimum=1
    )

    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        import torch

        file, device = self._file(model.name), groups.keys.device
        _, heads, group, size = groups.keys.shape
        mean, covariance = _to_come(file, model, layer, group, self.horizon, device)
        turned = _turn(groups.keys, file.layer(model, layer, device)[FREQUENCIES])
        mean = mean.view(heads, -1, size)
        covariance = covariance.view(heads, -1, size, size)
        spread = torch.einsum("nhgd,hqde,nhge->nhqg", turned, covariance, turned)
        logits = torch.einsum("nhgd,hqd->nhqg", turned, mean) / math.sqrt(size)
        expected: Tensor = (logits + spread / (2 * size)).logsumexp(2)
        norms: Tensor = groups.values.norm(dim=-1)
        return expected + norms.clamp_min(1e-9).log()

    def _file(self, model_name: str) -> TensorFile:
        path = shipped_or(self.queries, model_name, "queries.safetensors")
        named = self.queries is not None
        return TensorFile(self.name, "queries", path, named, QUERIES_FORMAT, PARTS)


def _turn(keys: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate keys as if each group ``[..., G, d]`` began at position 0."""
    import torch

    positions = torch.arange(keys.shape[-2], device=keys.device)
    angles = positions[:, None] * frequencies
    half = len(frequencies)
    first, second, rest = keys.tensor_split((half, 2 * half), -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@follows_files
@lru_cache(maxsize=1024)
def _to_come(
    file: TensorFile,
    model: ModelShape,
    layer: int,
    group: int,
    horizon: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Mean ``[H_q, d]`` and covariance of queries at positions behind a group."""
    import torch

    parts = file.layer(model, layer, device)
    mean, frequencies = parts["mean"], parts[FREQUENCIES]
    positions = torch.arange(group, group + horizon, device=device)
    angles = positions[:, None] * frequencies
    half = torch.arange(len(frequencies), device=device)
    turn = torch.eye(mean.shape[-1], device=device)
    turn[half, half] = turn[half + len(half), half + len(half)] = angles.cos().mean(0)
    turn[half + len(half), half] = angles.sin().mean(0)
    turn[half, half + len(half)] = -angles.sin().mean(0)
    return mean @ turn.T, turn @ parts["covariance"] @ turn.T
