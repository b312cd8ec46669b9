# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decode step goes, at 32 and at 128 running requests.

The shape of Llama-3.1-8B. Milliseconds of a step by the clock, what of it the host
spent in the scheduler and in the worker, and how long the GPU's kernels ran.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from scripts.gpu.stages.cases import large_model, named, run_cases, spec_of
from scripts.gpu.stages.common import GRAPHS, EngineSpec, Stage, stage_main
from scripts.gpu.stages.shapes import DUMMY

ENGINES = ("none", "full", "retrieval:budget=0.25")
RUNNING = {32: 8000, 128: 2000}
"""Requests, and tokens of each."""
STEPS, PROFILED = 24, 6
LIMIT = 75
MODULE = "scripts.gpu.stages.step"


def reply_tokens(requests: int) -> int:
    """So many that the first is still running when the last has been read."""
    return 4 * requests + STEPS + PROFILED + 16


def load(stage: Stage, running: int) -> tuple[int, int]:
    """Requests and tokens of each."""
    return (running, RUNNING[running]) if stage.on_gpu else (2, 640)


def options_of(stage: Stage, requests: int, tokens: int) -> dict[str, Any]:
    graphs: dict[str, Any] = {"enforce_eager": True}
    if stage.on_gpu:
        sizes = {"cudagraph_capture_sizes": [1, requests]}
        graphs = {**GRAPHS, "gpu_memory_utilization": 0.5}
        graphs["compilation_config"] = {**GRAPHS["compilation_config"], **sizes}
    return {
        **DUMMY,
        **graphs,
        "dtype": stage.dtype,
        "max_model_len": tokens + reply_tokens(requests),
        "max_num_seqs": requests,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": (44 if stage.on_gpu else 1) << 30,
    }


def cases(stage: Stage) -> list[str]:
    running = list(RUNNING) if stage.on_gpu else [32]
    return [f"{name} x {count}" for count in running for name in ENGINES]


def parts_of(case: str) -> tuple[str, int]:
    name, _, running = case.rpartition(" x ")
    return name, int(running)


def engines(stage: Stage) -> dict[str, EngineSpec]:
    model, found = large_model(stage), {}
    for case in cases(stage):
        name, running = parts_of(case)
        requests, tokens = load(stage, running)
        options = options_of(stage, requests, tokens)
        found[case] = spec_of(stage, name, model, tokens, options)
    return found


class Clock:
    """Adds up the seconds that methods take.

    Methods of one object that call each other count twice; these do not.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, name, timed)


def decode(stage: Stage, engine: Any, requests: int, tokens: int) -> None:
    """Fill the batch, and time steps in which every request gets a token."""
    from vllm import SamplingParams

    from benchmarks.engines import random_prompts

    params = SamplingParams(
        temperature=0, max_tokens=reply_tokens(requests), ignore_eos=True
    )
    for number, ids in enumerate(random_prompts(requests, tokens, seed=1)):
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    start = time.perf_counter()
    while len(engine.step()) < requests:
        pass
    stage.note(fill_s=round(time.perf_counter() - start, 2))
    for _ in range(3):
        engine.step()
    core = engine.engine_core.engine_core
    clock, walls = Clock(), []
    clock.watch(core.scheduler, "schedule")
    clock.watch(core.scheduler, "update_from_output")
    clock.watch(core.model_executor, "execute_model")
    clock.watch(core.model_executor, "sample_tokens")
    for _ in range(STEPS):
        start = time.perf_counter()
        outputs = engine.step()
        walls.append(time.perf_counter() - start)
        assert len(outputs) == requests
    each = {name: round(s / STEPS * 1e3, 3) for name, s in clock.seconds.items()}
    stage.note(step_ms=round(statistics.median(walls) * 1e3, 3), host_ms=each)
    if stage.on_gpu:
        stage.note(**kernels(engine, statistics.median(walls)))


def kernels(engine: Any, wall: float) -> dict[str, Any]:
    """What ran on the GPU in a step, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
    events = profiler.key_averages()
    spent = {event.key: event.self_device_time_total for event in events}
    total = sum(spent.values()) / PROFILED / 1e3
    longest = sorted(spent, key=lambda key: -spent[key])[:12]
    share = 1 - total / (wall * 1e3)
    return {
        "gpu_ms": round(total, 3),
        "not_on_gpu": round(share, 3),
        "kernels_ms": {
            key[:80]: round(spent[key] / PROFILED / 1e3, 3) for key in longest
        },
    }


def run(stage: Stage) -> None:
    if stage.case is None:
        run_cases(stage, MODULE, cases(stage), LIMIT)
        return
    from benchmarks.engines import start_engine

    name, running = parts_of(stage.case)
    requests, tokens = load(stage, running)
    model = large_model(stage)
    options = options_of(stage, requests, tokens)
    start = time.perf_counter()
    llm = start_engine(named(stage, name, model), str(model), tokens, options)
    stage.note(start_s=round(time.perf_counter() - start, 1))
    decode(stage, llm.llm_engine, requests, tokens)


if __name__ == "__main__":
    stage_main(run, engines)
