# SPDX-License-Identifier: Apache-2.0
"""LoRA on CPUs, for batches in which some requests have no adapter.

vLLM 0.32 writes -1 for these and looks it up as it stands: they get the adapter in the
last slot. Its kernels for GPUs leave such rows alone, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

_PATH = f"{__name__}.AdaptersCPU"


class AdaptersCPU(PunicaWrapperCPU):
    """Adds each row its own adapter, and to rows without one nothing."""

    def add_lora_linear(self, y: Tensor, *args: Any, **kwargs: Any) -> None:
        with _sparing(y, self.token_lora_indices):
            super().add_lora_linear(y, *args, **kwargs)

    def add_lora_embedding(self, y: Tensor, *args: Any, **kwargs: Any) -> None:
        with _sparing(y, self.token_lora_indices):
            super().add_lora_embedding(y, *args, **kwargs)

    def add_lora_logits(self, y: Tensor, *args: Any, **kwargs: Any) -> None:
        with _sparing(y, self.sampler_indices):
            super().add_lora_logits(y, *args, **kwargs)


@contextmanager
def _sparing(y: Tensor, indices: Tensor) -> Iterator[None]:
    """Put rows of ``y``, ``[rows, n]``, that have no adapter back as they were."""
    rows = y.view(-1, y.shape[-1])
    without = (indices < 0).nonzero().flatten()
    before = rows[without]
    yield
    rows[without] = before


@contextmanager
def own_adapters() -> Iterator[None]:
    """Have a model that is loaded inside add adapters so."""
    platform = type(current_platform)
    stock = platform.__dict__["get_punica_wrapper"]
    platform.get_punica_wrapper = classmethod(lambda _: _PATH)  # type: ignore[assignment]
    try:
        yield
    finally:
        platform.get_punica_wrapper = stock  # type: ignore[method-assign]
