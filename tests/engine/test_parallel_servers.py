# SPDX-License-Identifier: Apache-2.0
"""Servers of two ranks and of two replicas say what one engine says."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Model, tiny_model
from tests.engine.harness import EngineSlot, random_prompts
from tests.engine.servers import metric, running_server
from tests.reference.models import TinyLlama

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TINY = TinyLlama("tiny-gqa-4", 3, 8, 4, head_size=32, hidden_size=128)
LENGTHS = [64, 333, 700, 90, 129, 401, 257, 310]
STEPS = 48
POLICIES: dict[str, dict[str, Any]] = {
    "retrieval": {"full_ratio": 0.4, "recent": 96},
    "h2o": {"heavy": 40, "recent": 48},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(TINY, tmp_path_factory.mktemp("servers"))


@pytest.mark.parametrize(
    ("flag", "policy"),
    [
        ("--data-parallel-size", "retrieval"),
        ("--data-parallel-size", "h2o"),
        ("--tensor-parallel-size", "retrieval"),
    ],
)
def test_two_of_them_answer_as_one_does(
    flag: str, policy: str, model: Model, engines: EngineSlot, tmp_path: Path
) -> None:
    values = model.policy_args(policy, **POLICIES[policy])
    prompts = random_prompts(LENGTHS, model.vocab, seed=6)
    engine = engines.start(model.path, policy, values, max_num_batched_tokens=200)
    expected = [reply.tokens for reply in engine.generate(prompts, STEPS)]
    engines.close()
    flags = [
        *(str(model.path), "--served-model-name", "tiny", flag, "2"),
        *("--policy", policy, "--dtype", "float32", "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", "64M", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "200"),
    ]
    for name, value in values.items():
        flags += ["--policy-arg", f"{name}={value}"]
    with running_server(flags, tmp_path / "log") as base:
        with ThreadPoolExecutor(len(prompts)) as clients:
            found = list(clients.map(lambda prompt: _complete(base, prompt), prompts))
        served = metric(base, "vllm:request_success_total")
        held = metric(base, "vllm:kv_cache_usage_perc")
    assert found == expected
    engine_count = 2 if flag == "--data-parallel-size" else 1
    assert len(served) == engine_count
    assert sum(served.values()) == len(prompts)
    assert all(count > 0 for count in served.values())
    assert set(held.values()) == {0}


def _complete(base: str, prompt: list[int]) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": STEPS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{base}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        tokens: list[int] = json.load(reply)["choices"][0]["token_ids"]
        return tokens
