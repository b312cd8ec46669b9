# SPDX-License-Identifier: Apache-2.0
"""Fused kernels give what PyTorch's operators give, where they are taken."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from kvserve.engine.devices.cpu_operators import PROVIDER, fused_gates, register
from kvserve.engine.start.options import _on_cpu

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="kernels of the CPU build"
)

EPSILON = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    current_platform.import_kernels()
    register()


@pytest.mark.parametrize("shape", [(7, 96), (100, 33), (2, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_pytorch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    norm, both = ir.ops.rms_norm.impls, ir.ops.fused_add_rms_norm.impls
    torch.testing.assert_close(
        norm[PROVIDER].func_impl_fn(x, weight, EPSILON),
        norm["native"].func_impl_fn(x, weight, EPSILON),
    )
    for ours, theirs in zip(
        both[PROVIDER].impl_fn(x.clone(), residual.clone(), weight, EPSILON),
        both["native"].impl_fn(x.clone(), residual.clone(), weight, EPSILON),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_norms_of_bfloat16_round_as_pytorchs() -> None:
    torch.manual_seed(2)
    x, residual = torch.randn(2, 50, 576).bfloat16()
    weight = torch.randn(576).bfloat16()
    both = ir.ops.fused_add_rms_norm.impls
    ours, kept = both[PROVIDER].impl_fn(x, residual.clone(), weight, EPSILON)
    theirs, summed = both["native"].impl_fn(x, residual.clone(), weight, EPSILON)
    assert torch.equal(kept, summed)
    # A mean that is summed in another order may round one number in thousands apart.
    assert (ours != theirs).float().mean() < 1e-3


def test_norms_without_weights_or_of_strided_rows_stay_pytorchs() -> None:
    norm = ir.ops.rms_norm.impls[PROVIDER]
    rows = torch.zeros(4, 8)
    assert norm.supports_args(rows, torch.ones(8), EPSILON)
    assert not norm.supports_args(rows, None, EPSILON)
    assert not norm.supports_args(rows.t(), torch.ones(4), EPSILON)
    assert not norm.supports_args(rows, torch.ones(8, dtype=torch.bfloat16), EPSILON)


def test_gates_are_fused_in_layers_that_are_built_inside() -> None:
    x = torch.randn(3, 32)
    with set_current_vllm_config(VllmConfig()):
        with fused_gates():
            fused = SiluAndMul()
        stock = SiluAndMul()
    assert fused._forward_method != stock._forward_method
    torch.testing.assert_close(fused._forward_method(x), SiluAndMul.forward_native(x))


def test_nothing_is_compiled_unless_somebody_asks() -> None:
    assert _on_cpu({})["enforce_eager"]
    assert "kernel_config" in _on_cpu({"enforce_eager": True})
    for asked in (
        {"optimization_level": 2},
        {"compilation_config": {"mode": 1}},
        {"enforce_eager": False},
    ):
        chosen = _on_cpu(asked)
        assert not chosen["enforce_eager"]
        assert "kernel_config" not in chosen
