# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmark client (``vllm bench serve``), run in this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark

from kvserve.bench.workloads import Request

_ENDPOINT = "/v1/chat/completions"


def send(
    base_url: str,
    model: str,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    rate: float = float("inf"),
    concurrency: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Send ``requests`` and return what vLLM's client measured.

    Replies are greedy and exactly as long as the request says, so every server does
    the same work.

    Args:
        model: its name on the server.
        rate: requests a second, arriving as a Poisson process; infinite: all at once.
        concurrency: most requests in flight; ``None``: no limit.

    Returns:
        Its result, with a list per request of ``ttfts``, ``itls`` and ``latencies``
        in seconds, ``errors``, and totals such as ``duration``.
    """
    random.seed(seed)
    np.random.seed(seed)
    # Its report of fifty lines would hide the table that follows.
    with contextlib.redirect_stdout(io.StringIO()):
        return asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=base_url + _ENDPOINT,
                base_url=base_url,
                model_id=model,
                model_name=model,
                tokenizer=None,
                input_requests=[_sample(request) for request in requests],
                logprobs=None,
                request_rate=rate,
                burstiness=1.0,
                disable_tqdm=not progress,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[99.0],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0.0},
                ready_check_timeout_sec=0,
            )
        )


def _sample(request: Request) -> SampleRequest:
    messages: list[dict[str, Any]] = [dict(message) for message in request.messages]
    return SampleRequest(
        prompt=request.messages[-1]["content"],
        prompt_len=0,
        expected_output_len=request.output_tokens,
        chat_messages=messages,
    )
