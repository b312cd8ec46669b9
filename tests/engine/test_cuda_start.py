# SPDX-License-Identifier: Apache-2.0
"""Starting on CUDA: who may, with what, and what vLLM's CUDA platform makes of it.

A stand-in says that the platform is CUDA; no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import AttentionConfig, CompilationConfig, CUDAGraphMode
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from kvserve.engine.devices import hardware
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start import options
from kvserve.engine.start.options import EXPERIMENTAL_CUDA, engine_options
from kvserve.engine.worker.backend import HeadPagedBackend, HeadPagedMetadataBuilder
from kvserve.engine.worker.worker import _attention_backend
from kvserve.errors import UserError
from kvserve.plan.dense import DenseRule
from kvserve.plan.mixed import MixedRule
from kvserve.plan.streaming import StreamRule
from policies.base import ModelShape
from policies.full import Full
from policies.h2o import H2O

pytestmark = pytest.mark.engine

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
MODEL = ModelShape("any", 2, 4, 2, 64, 1024)


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda"
    )
    monkeypatch.setattr(options, "current_platform", platform)
    monkeypatch.setattr(hardware, "current_platform", platform)
    monkeypatch.delenv(EXPERIMENTAL_CUDA, raising=False)
    # Set first, so that it is unset when the test is done.
    monkeypatch.setenv(_RUNNER, "0")
    monkeypatch.delenv(_RUNNER)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch)


@pytest.fixture
def opted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch)
    monkeypatch.setenv(EXPERIMENTAL_CUDA, "1")


def start(**asked: Any) -> dict[str, Any]:
    return engine_options(PolicySettings("full"), {"model": "any", **asked})


@pytest.mark.usefixtures("cuda")
def test_a_policy_is_refused_unless_asked_for() -> None:
    with pytest.raises(UserError, match="--experimental-cuda") as refusal:
        start()
    assert "--policy none" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("cuda")
def test_the_flag_opts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENTAL_CUDA, "")
    options.prepare_environment({"experimental_cuda": True})
    assert os.environ[EXPERIMENTAL_CUDA] == "1"
    assert start()


@pytest.mark.usefixtures("opted_in")
def test_the_gpu_worker_runs_under_the_runner_that_has_hooks() -> None:
    found = start()
    assert found["worker_cls"] == "kvserve.engine.worker.worker.HeadPagedWorker"
    assert found["async_scheduling"] is False
    assert found["block_size"] == 32
    assert os.environ[_RUNNER] == "0"


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize(
    "asked", [{"attention_backend": "FLASHINFER"}, {"async_scheduling": True}]
)
def test_what_a_policy_replaces_is_refused(asked: dict[str, Any]) -> None:
    flag = "--" + next(iter(asked)).replace("_", "-")
    with pytest.raises(UserError, match=flag):
        start(**asked)


@pytest.mark.usefixtures("opted_in")
def test_the_cuda_platform_takes_our_backend_while_a_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("vllm._C_stable_libtorch") is None:
        # Kernels of the CUDA build, of which picking a backend needs none.
        name = "vllm._C_stable_libtorch"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    cuda_platform = importlib.import_module("vllm.platforms.cuda").CudaPlatformBase
    monkeypatch.setattr(
        cuda_platform, "get_device_capability", lambda: DeviceCapability(9, 0)
    )
    asked = AttentionSelectorConfig(128, torch.bfloat16, "auto", 32)
    attention = AttentionConfig()
    path = f"{HeadPagedBackend.__module__}.{HeadPagedBackend.__qualname__}"
    with _attention_backend(path, attention):
        found = cuda_platform.get_attn_backend_cls(attention.backend, asked)
        assert found == path
        assert AttentionBackendEnum[HeadPagedBackend.get_name()] is attention.backend
    assert attention.backend is None
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


def test_graphs_replay_decode_steps_of_policies_of_positions_alone() -> None:
    positions = StreamRule(Full(), MODEL, 32, 1024)
    for rule, expected in (
        (positions, CUDAGraphMode.FULL_AND_PIECEWISE),
        (DenseRule(H2O(), MODEL, 32, 1024), CUDAGraphMode.PIECEWISE),
        (MixedRule(positions), CUDAGraphMode.PIECEWISE),
    ):
        spec: Any = SimpleNamespace(rule=rule)
        no_layers = SimpleNamespace(static_forward_context={})
        config: Any = SimpleNamespace(compilation_config=no_layers)
        support = HeadPagedMetadataBuilder.get_cudagraph_support(config, spec)
        compilation = CompilationConfig(
            mode=3, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
        )
        compilation.set_splitting_ops_for_v1("naive", 1)
        found = compilation.resolve_cudagraph_mode_and_sizes(support, "ours")
        assert found == expected
