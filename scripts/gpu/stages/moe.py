# SPDX-License-Identifier: Apache-2.0
"""Four layers of Qwen3-30B-A3B with random weights: a model with experts is served."""

from __future__ import annotations

import time

from scripts.gpu.stages.cases import large_model
from scripts.gpu.stages.common import EngineSpec, Stage, stage_main
from scripts.gpu.stages.shapes import DUMMY, SMALL, write_shape

LAYERS, REQUESTS, TOKENS, STEPS = 4, 8, 4000, 32
SMALL_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def engines(stage: Stage) -> dict[str, EngineSpec]:
    name = "qwen3-30b-a3b"
    if stage.on_gpu:
        model = large_model(stage, name, num_hidden_layers=LAYERS)
    else:
        model = write_shape(stage.folder, name, SMALL | SMALL_EXPERTS)
    options = {
        **DUMMY,
        "max_model_len": TOKENS + STEPS,
        "max_num_batched_tokens": 8192 if stage.on_gpu else 512,
        "kv_cache_memory_bytes": (4 if stage.on_gpu else 1) << 30,
    }
    return {
        "stock": EngineSpec(str(model), None, {}, options),
        "full": EngineSpec(str(model), "full", {}, options),
    }


def run(stage: Stage) -> None:
    from tests.engine.harness import random_prompts

    count, tokens = (REQUESTS, TOKENS) if stage.on_gpu else (2, 90)
    asked = random_prompts([tokens] * count, 1000, seed=3)
    for name, spec in engines(stage).items():
        with stage.attempt(name), stage.engine(spec) as engine:
            engine.generate(asked[:1], 2)
            start = time.perf_counter()
            replies = engine.generate(asked, STEPS)
            seconds = time.perf_counter() - start
            assert all(len(reply.tokens) == STEPS for reply in replies)
            stage.note(**{name: {"seconds": round(seconds, 2)}})


if __name__ == "__main__":
    stage_main(run, engines)
