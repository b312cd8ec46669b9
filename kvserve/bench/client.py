# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmark client (``vllm bench serve``), run in this process.

Except for how a stream is read: vLLM's takes a chunk for a token, and a stream that
breaks off for a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    RequestFuncInput,
    RequestFuncOutput,
    StreamedResponseHandler,
)
from vllm.benchmarks.serve import TaskType, benchmark

from kvserve.bench.stream import DONE, Reply
from kvserve.bench.workloads import Request

ENDPOINT = "/v1/chat/completions"
_OURS = "kvserve-chat"


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
        in seconds, ``output_lens`` (0 for a request that failed), ``errors``, and
        totals such as ``duration``.
    """
    ASYNC_REQUEST_FUNCS[_OURS] = ask
    random.seed(seed)
    np.random.seed(seed)
    # Its report of fifty lines would hide the table that follows.
    with contextlib.redirect_stdout(io.StringIO()):
        return asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type=_OURS,
                api_url=base_url + ENDPOINT,
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


async def ask(
    request_func_input: RequestFuncInput,
    session: aiohttp.ClientSession,
    pbar: Any = None,
) -> RequestFuncOutput:
    """Send one request and time its tokens, in the shape that vLLM's client wants."""
    asked = request_func_input
    output = RequestFuncOutput(prompt_len=asked.prompt_len)
    reply, start = Reply(), time.perf_counter()
    output.start_time = start
    try:
        async with session.post(
            asked.api_url, json=_body(asked), headers=_headers()
        ) as response:
            if response.status == 200:
                await _read(response, reply)
                output.error = reply.end()
            else:
                output.error = f"HTTP {response.status} {await response.text()}".strip()
    except (OSError, TimeoutError, ValueError, aiohttp.ClientError) as error:
        output.error = f"{type(error).__name__}: {error}"
    output.success = not output.error
    if reply.first is not None:
        output.ttft, output.itl = reply.first - start, reply.gaps
        output.latency = reply.last - start
    output.output_tokens, output.generated_text = reply.tokens, reply.text
    output.prompt_len = reply.prompt_tokens or asked.prompt_len
    if pbar:
        pbar.update(1)
    return output


def _body(asked: RequestFuncInput) -> dict[str, Any]:
    return {
        "model": asked.model_name or asked.model,
        "messages": asked.chat_messages,
        "max_completion_tokens": asked.output_len,
        "ignore_eos": asked.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **(asked.extra_body or {}),
    }


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _read(response: aiohttp.ClientResponse, reply: Reply) -> None:
    handler = StreamedResponseHandler()  # type: ignore[no-untyped-call]
    async for part in response.content.iter_any():
        now = time.perf_counter()
        for message in handler.add_chunk(part):
            # A comment, which keeps a connection open, begins with a colon.
            data = message.removeprefix("data: ")
            if data != DONE and not message.startswith(":"):
                reply.add(json.loads(data), now)
