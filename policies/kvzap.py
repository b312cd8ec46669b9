# SPDX-License-Identifier: Apache-2.0
"""A small network guesses what repeating the text would look at (KVzap, 2601.07891).

KVzap (arXiv 2601.07891, section 3) trains for each layer a network that foretells
KVzip's scores (``kvserve.profiling.repetition``), for to measure them takes a second
reading. Its inputs are hidden states; here they are what a cache holds, the keys
before rotation and the values of all KV heads of the layer, so that a token can be
judged when it leaves the window. The paper keeps what scores above a threshold; here
each head keeps its best ``k`` of a group.

Heads that copy look at nearly all they repeat as hard, and to the network nearly all of
a group is worth as much. Among equals unusual keys come first: what is guessed and
what :mod:`policies.keydiff` says are added, each by its spread in the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from policies.base import ModelShape, parameter
from policies.files import shipped_or
from policies.keydiff import unlikeness
from policies.tensor_files import MeasuredPolicy, TensorFile
from policies.thinning import THINNING, Groups

if TYPE_CHECKING:
    from torch import Tensor

SCORER_FORMAT = "kvserve-kvzap/1"
PARTS = ("mean", "std", "hidden.weight", "hidden.bias", "out.weight", "out.bias")
"""A network's tensors: of ``F`` inputs what is taken away and what divides the rest,
``[F]``, then two layers, ``[W, F]`` and ``[H_kv, W]``, and their biases."""

Network = dict[str, "Tensor"]


@dataclass(frozen=True)
class KVzap(MeasuredPolicy):
    """Of what leaves the window, what a trained network expects to be needed stays."""

    name: ClassVar[str] = "kvzap"
    paper: ClassVar[str] = "KVzap, arXiv 2601.07891; KVzip, arXiv 2505.23416"
    capabilities: ClassVar[Any] = THINNING

    weights: str | None = parameter(
        None,
        "file of `kvserve profile scorer`; without it, the one that ships for the "
        "model",
    )

    def scores(self, model: ModelShape, layer: int, groups: Groups) -> Tensor:
        network = self._file(model.name).layer(model, layer, groups.keys.device)
        guesses = foretell(network, inputs_of(groups))
        return _standard(guesses) + _standard(unlikeness(groups.keys))

    def _file(self, model_name: str) -> TensorFile:
        path = shipped_or(self.weights, model_name, "kvzap.safetensors")
        named = self.weights is not None
        return TensorFile(self.name, "weights", path, named, SCORER_FORMAT, PARTS)


def _standard(scores: Tensor) -> Tensor:
    """Bring scores of a group, ``[..., G]``, to mean 0 and variance 1."""
    spread = scores.std(-1, correction=0, keepdim=True).clamp_min(1e-6)
    return (scores - scores.mean(-1, keepdim=True)) / spread


def inputs_of(groups: Groups) -> Tensor:
    """Lay a token's keys of all heads, then its values, side by side.

    Returns:
        ``[n, G, 2 * H_kv * d]``.
    """
    import torch

    return torch.cat([groups.keys, groups.values], 1).transpose(1, 2).flatten(2)


def foretell(network: Network, inputs: Tensor) -> Tensor:
    """Guess log scores, ``[n, H_kv, G]``, of inputs ``[n, G, F]``."""
    from torch.nn.functional import gelu, linear

    scaled = (inputs - network["mean"]) / network["std"]
    hidden = gelu(linear(scaled, network["hidden.weight"], network["hidden.bias"]))
    scores: Tensor = linear(hidden, network["out.weight"], network["out.bias"])
    return scores.transpose(1, 2)
