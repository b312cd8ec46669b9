# SPDX-License-Identifier: Apache-2.0
"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def upload(array: Array, device: torch.device) -> torch.Tensor:
    """Copy an array to a new tensor on ``device``."""
    return _pinned(array, device).to(device, non_blocking=True)


def upload_all(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays of one type, as one: every copy costs some microseconds."""
    if not arrays:
        return []
    flat = upload(np.concatenate([array.ravel() for array in arrays]), device)
    parts = flat.split_with_sizes([array.size for array in arrays])
    return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]


class Buffer:
    """Memory of a device that stays where it is, written anew at every step.

    A CUDA graph reads the addresses that it was captured with. Arrays of one shape get
    one address.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        # Written inside and outside of inference mode.
        with torch.inference_mode(False):
            self._memory = torch.zeros(numbers, dtype=dtype, device=device)

    def put(self, array: Array) -> torch.Tensor:
        """Copy an array here; the tensor is valid until the next one."""
        tensor = self._memory[: array.size].view(array.shape)
        host = _pinned(array, self._memory.device)
        return tensor.copy_(host, non_blocking=True)


def _pinned(array: Array, device: torch.device) -> torch.Tensor:
    """Lay an array out for the copy.

    Pinned memory comes from PyTorch's cache, which gives it to nobody else before the
    copy is done: steps may follow each other without waiting.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory() if device.type != "cpu" else host
