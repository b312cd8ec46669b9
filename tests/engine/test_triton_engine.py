# SPDX-License-Identifier: Apache-2.0
"""The engine over the GPU's kernels: in Triton's interpreter, and on a GPU itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvserve.engine.devices import hardware
from tests.engine.conftest import Model, tiny_model
from tests.engine.harness import EngineSlot, random_prompts
from tests.reference.models import TinyLlama

pytest.importorskip("triton")
pytestmark = pytest.mark.engine

NEEDS_GPU = pytest.mark.skipif(
    not hardware.has_gpu(), reason="needs a GPU and its vLLM"
)

_BOUNDED = {"sinks": 32, "recent": 32}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": _BOUNDED,
    "retrieval": {**_BOUNDED, "full_ratio": 0.34},
    "h2o": {"heavy": 32, "recent": 40},
}
EVERYTHING: dict[str, dict[str, Any]] = {
    "sink-recent": {"sinks": 32, "recent": 2048},
    "h2o": {"heavy": 1000, "recent": 100},
}


TINY = TinyLlama(
    "tiny-two",
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=32,
    hidden_size=64,
)
"""The interpreter takes tens of milliseconds for what a GPU does in microseconds."""


def check_replies(folder: Path, names: list[str], *flags: str) -> None:
    """Compare every way to serve these policies with the CPU's."""
    model = tiny_model(TINY, folder)
    values = {name: model.policy_args(name, **POLICIES[name]) for name in names}
    policies = folder / "policies.json"
    policies.write_text(json.dumps(values))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.engine.triton_replies"),
            *(str(model.path), str(policies), *flags),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        cpu, *ways = found[name]
        assert cpu["device"] in ("CPUDevice", "ConvertingCPUDevice")
        # The second way pads decode steps as CUDA graphs do.
        assert len(ways) == (1 if name == "h2o" else 2)
        for way in ways:
            assert way["device"] == "TritonDevice"
            assert way["tokens"] == cpu["tokens"], name


def test_replies_are_those_of_the_cpu(tmp_path: Path) -> None:
    check_replies(tmp_path, ["sink-recent", "h2o"])


@pytest.mark.slow
def test_replies_of_preempted_requests_are_those_of_the_cpu(tmp_path: Path) -> None:
    check_replies(tmp_path, list(POLICIES), "--preempt")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["int8_per_token_head", "fp8_per_token_head"])
def test_replies_from_pages_of_bytes_are_those_of_the_cpu(
    tmp_path: Path, cache: str
) -> None:
    check_replies(tmp_path, ["retrieval", "h2o"], "--cache", cache)


@pytest.fixture
def opted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVE_EXPERIMENTAL_CUDA", "1")
    # Stock engines too: vLLM may look it up once a process.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("policy", EVERYTHING)
def test_a_budget_of_the_whole_sequence_is_stock_vllm_on_a_gpu(
    engines: EngineSlot,
    models: dict[str, Model],
    policy: str,
    eager: bool,
) -> None:
    model = models["tiny-gqa"]
    prompts = random_prompts([3, 64, 333, 700], model.vocab, seed=4)
    options: dict[str, Any] = {"max_num_batched_tokens": 200, "enforce_eager": eager}
    stock = engines.start(model.path, None, None, **options).generate(prompts, 32)
    engine = engines.start(model.path, policy, EVERYTHING[policy], **options)
    ours = engine.generate(prompts, 32)
    assert [reply.tokens for reply in ours] == [reply.tokens for reply in stock]


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_graphs_change_no_reply(
    engines: EngineSlot,
    models: dict[str, Model],
    policy: str,
) -> None:
    model = models["tiny-gqa"]
    # Three requests: the graph of four has a row of padding.
    prompts = random_prompts([40, 333, 700], model.vocab, seed=5)
    values = model.policy_args(policy, **POLICIES[policy])
    found = []
    for eager in (True, False):
        engine = engines.start(model.path, policy, values, enforce_eager=eager)
        replies = engine.generate(prompts, 80)
        found.append([reply.tokens for reply in replies])
    assert found[0] == found[1]
