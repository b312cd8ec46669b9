# SPDX-License-Identifier: Apache-2.0
"""Norms and gates in one kernel each, for models on CPUs that are not compiled.

vLLM 0.32 leaves them to PyTorch's operators, five or more for each, and trusts the
compiler to fuse them. Without a compiler a step of a small model spends a good part of
its time on calling operators. The gate's kernel is vLLM's own. Its norms are not taken:
in bfloat16 they put log probabilities three times as far off as PyTorch's do.
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

from kvserve.kernels import native

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
        and native.can_normalise(x.dtype)
    )


def _both_fit(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    if not (x_residual.is_contiguous() and x_residual.dtype == x.dtype):
        return False
    return _rows_fit(x, weight, epsilon, variance_size)


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    assert weight is not None
    return native.rms_norm(x, weight, epsilon)


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    return native.rms_norm(x, weight, epsilon, x_residual), x_residual


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
