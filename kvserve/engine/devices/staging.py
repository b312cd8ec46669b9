# SPDX-License-Identifier: Apache-2.0
"""Brings what the host works out for a step to where kernels read it.

On a CPU that is where it lies; ``device_staging`` is for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvserve.engine.batch.rows import StepRows
from kvserve.engine.devices.device import Device
from kvserve.engine.devices.uploads import Array

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class StagedRows:
    """A step's rows where kernels read them; fields as in ``HeadPagedMetadata``."""

    num_decode_tokens: int
    rows: list[Any]
    page_tables: torch.Tensor | list[torch.Tensor]
    slots: torch.Tensor | list[torch.Tensor]
    copies: Pairs = field(default_factory=list)


class Staging(Protocol):
    """Brings arrays of the host to the kernels."""

    def stage(self, step: StepRows | None, tokens: int) -> StagedRows:
        """Bring a step's rows.

        Args:
            step: ``None`` if no request runs and all tokens are padding.
            tokens: the step's tokens, padding included.
        """

    def tensors(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Bring arrays of one type."""

    def tensor(self, array: Array) -> torch.Tensor:
        """Bring one array."""


class HostStaging:
    """For a CPU: nothing is copied, and nobody pads."""

    def __init__(self, kernels: Device) -> None:
        self._kernels = kernels

    def stage(self, step: StepRows | None, tokens: int) -> StagedRows:
        assert step is not None
        prepared = [self._kernels.plan_rows(shape) for shape in step.shapes]
        tables, slots = step.page_tables, step.slots
        return StagedRows(
            step.num_decode_tokens,
            [prepared[shape] for shape in step.shape_of_layer],
            self.tensors(tables) if isinstance(tables, list) else self.tensor(tables),
            self.tensors(slots) if isinstance(slots, list) else self.tensor(slots),
            [(self.tensor(source), self.tensor(to)) for source, to in step.copies],
        )

    def tensors(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in arrays]

    def tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array)
