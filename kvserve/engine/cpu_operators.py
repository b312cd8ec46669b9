# SPDX-License-Identifier: Apache-2.0
"""vLLM's own fused CPU kernels, for models that are not compiled.

vLLM 0.32 has them, but leaves norms and gates on CPUs to PyTorch's operators, five or
more for each, and trusts the compiler to fuse them. Without a compiler a step of a
small model spends a good part of its time on calling operators.
"""

# ruff: noqa: ARG001  (vLLM compares signatures)
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul

PROVIDER = "kvserve"
"""What vLLM calls the source of an operator's implementation."""

_ORDER = [PROVIDER, "native"]
CHOICE: dict[str, Any] = {
    "ir_op_priority": {"rms_norm": _ORDER, "fused_add_rms_norm": _ORDER}
}
"""vLLM's ``kernel_config`` that takes them."""


def _rows_fit(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.is_contiguous()
    )


def _both_fit(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _rows_fit(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def register() -> None:
    """Make the kernels known to vLLM in this process; may be called more than once."""
    if PROVIDER in ir.ops.rms_norm.impls:
        return
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_rows_fit)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(
        PROVIDER, supports_args=_both_fit, inplace=True
    )(_fused_add_rms_norm)


@contextmanager
def fused_gates() -> Iterator[None]:
    """Have layers that are built inside gate and multiply in one kernel."""
    stock = SiluAndMul.forward_cpu
    SiluAndMul.forward_cpu = _silu_and_mul  # type: ignore[method-assign]
    try:
        yield
    finally:
        SiluAndMul.forward_cpu = stock  # type: ignore[method-assign]


def _silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops._C.silu_and_mul(output, x)
    return output
