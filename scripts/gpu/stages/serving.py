# SPDX-License-Identifier: Apache-2.0
"""Long prompts on equal memory: output tokens a second of stock vLLM and of policies.

``benchmarks.serving`` with the shape of Llama-3.1-8B and random weights: all requests
wait from the start, and as many run as the pool holds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from scripts.gpu.stages.cases import large_model, named, namespace, run_cases, spec_of
from scripts.gpu.stages.common import GRAPHS, EngineSpec, Stage, stage_main
from scripts.gpu.stages.shapes import DUMMY

ENGINES = (
    "none",
    "none:kv_cache_dtype=fp8",
    "retrieval:budget=0.25",
    "full",
    "retrieval:budget=0.25@fp8_per_token_head",
)
MODULE = "scripts.gpu.stages.serving"
LIMIT = 110


@dataclass(frozen=True)
class Load:
    """Requests, tokens of a prompt and of a reply, and the pool in GiB."""

    requests: int
    prompt: int
    output: int
    pool: int


LOADS = {
    "32k + 512, 20 GiB": Load(16, 32000, 512, 20),
    "8k + 1k, 20 GiB": Load(64, 8000, 1000, 20),
    "32k + 512, 40 GiB": Load(32, 32000, 512, 40),
}
SMALL = Load(4, 640, 8, 1)


def options_of(stage: Stage) -> dict[str, Any]:
    graphs: dict[str, Any] = {"enforce_eager": True}
    if stage.on_gpu:
        sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64]}
        graphs = {**GRAPHS, "gpu_memory_utilization": 0.5}
        graphs["compilation_config"] = {**GRAPHS["compilation_config"], **sizes}
    return {**DUMMY, **graphs, "max_num_batched_tokens": 8192}


def cases(stage: Stage) -> list[str]:
    loads = list(LOADS) if stage.on_gpu else list(LOADS)[:1]
    names = ENGINES if stage.on_gpu else ("none", "full", "retrieval:budget=0.25")
    return [f"{name} | {load}" for load in loads for name in names]


def parts_of(stage: Stage, case: str) -> tuple[str, Load]:
    name, _, load = case.partition(" | ")
    return name, LOADS[load] if stage.on_gpu else SMALL


def engines(stage: Stage) -> dict[str, EngineSpec]:
    model, found = large_model(stage), {}
    for case in cases(stage):
        name, load = parts_of(stage, case)
        tokens = load.prompt + load.output
        options = {
            **options_of(stage),
            "max_model_len": tokens + 64,
            "max_num_seqs": load.requests,
            "kv_cache_memory_bytes": load.pool << 30,
        }
        found[case] = spec_of(stage, name, model, tokens, options)
    return found


def run(stage: Stage) -> None:
    if stage.case is None:
        run_cases(stage, MODULE, cases(stage), LIMIT)
        return
    from benchmarks import serving

    name, load = parts_of(stage, stage.case)
    model = large_model(stage)
    found = serving.run(
        named(stage, name, model),
        namespace(
            model=str(model),
            requests=load.requests,
            prompt=load.prompt,
            output=load.output,
            kv_memory=f"{load.pool}GiB",
            dtype=stage.dtype,
            eager=not stage.on_gpu,
            options=options_of(stage),
        ),
    )
    stage.note(
        seconds=round(found.seconds, 2),
        output_tokens_s=round(found.output_tokens / found.seconds, 1),
        most_running=found.most_running,
        preempted=found.preemptions,
        ttft_s=round(found.ttft, 2),
        itl_ms=round(statistics.mean(found.gaps) * 1e3, 2),
    )


if __name__ == "__main__":
    stage_main(run, engines)
