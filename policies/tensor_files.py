# SPDX-License-Identifier: Apache-2.0
"""Tensors that were measured on a model, for its policies: safetensors that say whose.

Metadata has the file's ``format`` and the model's ``num_layers``,
``num_query_heads``, ``num_kv_heads`` and ``head_size``; what belongs to a layer is
called by the layer's number and a part's name, ``3.mean``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvserve.errors import UserError
from policies.base import HeadBudget, ModelShape
from policies.files import follows_files, read_bytes
from policies.thinning import ThinningPolicy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SIZES = ("num_layers", "num_query_heads", "num_kv_heads", "head_size")


@dataclass(frozen=True)
class TensorFile:
    """A file that a parameter of a policy names, or that of a model.

    Attributes:
        policy, parameter: whose it is, for messages.
        path: where it is.
        named: a user gave its path.
        format: what its metadata should call it.
        parts: what each layer has.
    """

    policy: str
    parameter: str
    path: Path
    named: bool
    format: str
    parts: tuple[str, ...]

    def check(self, model: ModelShape) -> None:
        """Hold the file against the model.

        Raises:
            UserError: there is none, it cannot be read, or it is of another model.
        """
        if not self.named and not self.path.exists():
            raise UserError(
                f"--policy {self.policy}: no {self.parameter} ship for {model.name}; "
                "run `kvserve profile scorer MODEL` first, or choose `--policy "
                "keydiff`, which needs none"
            )
        where = f"--policy-arg {self.parameter}={self.path}"
        try:
            sizes, layers = _header(self.path, self.format, self.parts)
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: malformed ({error}); expected what `kvserve profile scorer "
                "MODEL` writes"
            ) from None
        count = model.all_layers or model.num_layers
        heads = model.num_query_heads, model.num_kv_heads
        asked = (count, *heads, model.head_size)
        if sizes != asked:
            raise UserError(
                f"{where}: is of another model: {_shown(sizes)}, but {model.name} has "
                f"{_shown(asked)}"
            )
        missing = {*(model.chosen or range(count))} - layers
        if missing:
            raise UserError(
                f"{where}: has nothing for layer {min(missing)} of {model.name}; make "
                "it anew with `kvserve profile scorer MODEL`"
            )

    def layer(
        self, model: ModelShape, layer: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Return the parts of one layer in float32, and what belongs to all.

        Args:
            layer: among those that the policy decides on.
            device: where they are needed; there they stay.
        """
        own = model.chosen[layer] if model.chosen else layer
        return _layer(self.path, own, device)


@dataclass(frozen=True)
class MeasuredPolicy(ThinningPolicy):
    """A policy that thins by what a file of tensors says."""

    @abstractmethod
    def _file(self, model_name: str) -> TensorFile:
        """The file, for a model of this name."""

    def files(self, model_name: str) -> dict[str, Path]:
        file = self._file(model_name)
        found = {file.parameter: file.path} if file.path.is_file() else {}
        return {**super().files(model_name), **found}

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        """As those of all that thin.

        Raises:
            UserError: besides, there is no such file, or it is of another model.
        """
        self._file(model.name).check(model)
        return super().budgets(model, tokens)


def _shown(sizes: tuple[int, ...]) -> str:
    layers, query_heads, kv_heads, size = sizes
    return f"{layers} layers x {query_heads}/{kv_heads} query/KV heads of {size}"


@follows_files
@lru_cache(maxsize=8)
def _header(
    path: Path, expected: str, parts: tuple[str, ...]
) -> tuple[tuple[int, ...], frozenset[int]]:
    """The sizes of the model that a file is of, and the layers that it has whole."""
    content = read_bytes(path)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]
    if about["format"] != expected:
        raise ValueError(f"format {about['format']!r}, expected {expected!r}")
    sizes = tuple(int(about[name]) for name in _SIZES)
    whole = (
        layer
        for layer in range(sizes[0])
        if all(f"{layer}.{part}" in header for part in parts)
    )
    return sizes, frozenset(whole)


@follows_files
@lru_cache(maxsize=8)
def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(read_bytes(path))


@follows_files
@lru_cache(maxsize=1024)
def _layer(path: Path, layer: int, device: torch.device) -> dict[str, Tensor]:
    found = {}
    for name, tensor in _tensors(path).items():
        number, _, part = name.partition(".")
        if number == str(layer) or not part:
            found[part or name] = tensor.float().to(device)
    return found
