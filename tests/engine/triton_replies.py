# SPDX-License-Identifier: Apache-2.0
"""Replies of one engine, on a CPU's own kernels and on a GPU's in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.engine.triton_replies MODEL POLICIES [--preempt]
        [--cache TYPE]

``POLICIES``, a JSON file, has each policy's arguments. ``TYPE`` is what pages hold.
Prints a JSON object: of each policy, the device that ran and the tokens of each reply,
of every way to serve.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from kvserve.engine.devices import hardware
from policies.registry import create_policy
from tests.engine.harness import Engine, random_prompts

LENGTHS = [3, 40, 110]
"""Less than a page, a page and a bit, and more than the policies of the test keep."""
STEPS = 6
PREEMPTED_AT = 5
MAX_REQUESTS = 4


def replies(
    model: Path,
    policy: str,
    values: dict[str, Any],
    is_padded: bool,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """Serve in one batch, in chunks that cut prompts."""
    start = time.perf_counter()
    engine = Engine(
        model,
        policy,
        values,
        max_model_len=128,
        max_num_batched_tokens=72,
        max_num_seqs=MAX_REQUESTS,
        kv_cache_memory_bytes=8 << 20,
        kv_cache_dtype=flags.cache,
    )
    worker = engine._core.model_executor.driver_worker.worker
    if is_padded:
        pad_decode(worker.model_runner)
    prompts = random_prompts(LENGTHS, 512, seed=0)
    names = [engine.add(prompt, STEPS) for prompt in prompts]
    if flags.preempt:
        for _ in range(PREEMPTED_AT):
            engine.step()
        engine.preempt_all()
    engine.finish()
    device = type(worker._builder.kernels).__name__
    found = [engine.replies.pop(name).tokens for name in names]
    engine.close()
    seconds = time.perf_counter() - start
    print(
        f"{policy} {device} {is_padded}: {seconds:.1f} s", file=sys.stderr, flush=True
    )
    return {"device": device, "tokens": found}


def pad_decode(runner: Any) -> None:
    """Let the runner pad decode steps as for a CUDA graph, and rehearse a capture."""
    stock = runner._determine_batch_execution_and_padding

    def padded(**batch: Any) -> Any:
        found = stock(**batch)
        if batch["max_num_scheduled_tokens"] > 1:
            return found
        size = BatchDescriptor(MAX_REQUESTS, MAX_REQUESTS, uniform=True)
        return (CUDAGraphMode.FULL, size, *found[2:])

    runner._determine_batch_execution_and_padding = padded
    runner._dummy_run(
        MAX_REQUESTS,
        cudagraph_runtime_mode=CUDAGraphMode.FULL,
        uniform_decode=True,
        is_graph_capturing=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("policies", type=Path)
    parser.add_argument("--preempt", action="store_true")
    parser.add_argument("--cache", default="auto")
    flags = parser.parse_args()
    policies = json.loads(flags.policies.read_text())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in policies}
    for on_triton, is_padded in ((False, False), (True, False), (True, True)):
        hardware.uses_triton = lambda answer=on_triton: answer  # type: ignore[misc]
        for name, values in policies.items():
            # Graphs replay decode steps of policies of positions alone.
            positions = create_policy(name, values).capabilities.position_only
            if positions or not is_padded:
                way = replies(flags.model, name, values, is_padded, flags)
                found[name].append(way)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
