# SPDX-License-Identifier: Apache-2.0
"""The load of ``benchmarks.serving`` for OpenVINO GenAI, in its own environment.

Reads a job as JSON from the standard input and writes what it measured as JSON. The
model is a GGUF file, of which the embedded model is one; precision of weights and
cache are what OpenVINO chooses, the bytes of the cache what the job says.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

_FEW_BLOCKS = 64


def start(job: dict[str, Any], blocks: int) -> Any:
    """Start continuous batching with a cache of some blocks."""
    config = genai.SchedulerConfig()
    config.num_kv_blocks = blocks
    config.max_num_batched_tokens = 2048
    config.max_num_seqs = len(job["prompts"])
    if job["kept_tokens"]:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=32,
            recent_size=128,
            max_cache_size=job["kept_tokens"],
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return genai.ContinuousBatchingPipeline(job["model"], config, "CPU")


def blocks_in(job: dict[str, Any]) -> int:
    """Blocks that the cache has room for: OpenVINO says what some take."""
    pipeline = start({**job, "prompts": [[1]]}, _FEW_BLOCKS)
    submit(pipeline, "0", [7] * 40, 2)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    each = pipeline.get_metrics().kv_cache_size_in_bytes / _FEW_BLOCKS
    return int(job["cache_bytes"] / each)


def submit(pipeline: Any, number: Any, ids: list[int], output: int) -> Any:
    """Queue a request of just ``output`` tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = output, True, False
    tokens = openvino.Tensor(np.array([ids], dtype=np.int64))
    return pipeline.add_request(int(number), tokens, config)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Serve all prompts at once."""
    blocks = blocks_in(job)
    pipeline = start(job, blocks)
    handles = [
        submit(pipeline, number, ids, job["output"])
        for number, ids in enumerate(job["prompts"])
    ]
    last: dict[int, float] = {}
    first, gaps, timeline = [], [], []
    begin = time.perf_counter()
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter() - begin
        timeline.append((now, int(pipeline.get_metrics().scheduled_requests)))
        for number, handle in enumerate(handles):
            if not handle.can_read():
                continue
            handle.read()
            if number in last:
                gaps.append(now - last[number])
            else:
                first.append(now)
            last[number] = now
    return {
        "seconds": time.perf_counter() - begin,
        "first_token": first,
        "gaps": gaps,
        "timeline": timeline,
        "blocks": blocks,
        "version": genai.__version__,
    }


if __name__ == "__main__":
    json.dump(serve(json.load(sys.stdin)), sys.stdout)
