# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed of policies against stock vLLM, side by side in one run.

All engines live in this process and take turns, so that whatever else the machine is
doing hits them alike. Prints Markdown: medians over the rounds, with the spread.
Policies are written as for ``kvserve eval``; ``budget=`` is of a decode request.

    python -m benchmarks.speed --policies none full retrieval:budget=0.25 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams

from kvserve import LLM
from kvserve.evaluation.budgets import PolicySpec
from kvserve.evaluation.model import shape_of
from kvserve.models import resolve_model


def make_engine(policy: str, args: argparse.Namespace) -> Any:
    """Start an engine; ``none`` is stock vLLM."""
    chosen: dict[str, Any] = {"policy": None}
    if policy != "none":
        spec = PolicySpec.parse(policy)
        shape = shape_of(resolve_model(args.model))
        length = args.decode_tokens + args.decode_steps
        chosen = {"policy": spec.name, "policy_args": spec.arguments(length, shape)}
    return LLM(
        args.model,
        **chosen,
        dtype=args.dtype,
        max_model_len=args.prefill_tokens + 64,
        max_num_seqs=args.decode_requests,
        max_num_batched_tokens=args.chunk,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=None if policy != "none" else False,
        enforce_eager=args.eager,
    )


def add_requests(llm: Any, count: int, prompt: int, output: int, seed: int) -> None:
    """Queue ``count`` requests of random tokens."""
    tokens = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for number in range(count):
        ids = [tokens.randrange(100, 40000) for _ in range(prompt)]
        llm.llm_engine.add_request(
            f"{seed}-{number}", {"prompt_token_ids": ids}, params
        )


def prefill_seconds(llm: Any, prompt: int, seed: int) -> float:
    """Time from a queued prompt to its first token."""
    add_requests(llm, 1, prompt, 1, seed)
    start = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - start


def decode_seconds(llm: Any, args: argparse.Namespace, seed: int) -> float:
    """Median time of a decode step with all requests running."""
    requests = args.decode_requests
    add_requests(llm, requests, args.decode_tokens, args.decode_steps, seed)
    times = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        # Steps that still read a prompt return fewer outputs.
        if len(outputs) == requests and not any(o.finished for o in outputs):
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def report(title: str, measured: dict[str, list[float]], unit: float) -> None:
    """Print one table: median, spread, and the ratio to the first engine's median."""
    print(f"\n### {title}\n\n| engine | median ms | min | max | speed |")
    print("|---|---|---|---|---|")
    base = next(iter(measured.values()))
    for name, seconds in measured.items():
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        shown = [statistics.median(seconds), min(seconds), max(seconds)]
        cells = " | ".join(f"{value * unit:.1f}" for value in shown)
        print(f"| {name} | {cells} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--policies", nargs="+", default=["none", "full", "retrieval", "sink-recent"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--prefill-tokens", type=int, default=6000)
    parser.add_argument("--decode-requests", type=int, default=8)
    parser.add_argument("--decode-tokens", type=int, default=512)
    parser.add_argument("--decode-steps", type=int, default=56)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    engines = {policy: make_engine(policy, args) for policy in args.policies}
    prefill: dict[str, list[float]] = {policy: [] for policy in engines}
    decode: dict[str, list[float]] = {policy: [] for policy in engines}
    for seed in range(args.rounds + 1):
        for policy, llm in engines.items():
            prefill[policy].append(prefill_seconds(llm, args.prefill_tokens, seed))
            decode[policy].append(decode_seconds(llm, args, seed))
    warm = {p: s[1:] for p, s in prefill.items()}
    report(f"Prefill of {args.prefill_tokens} tokens", warm, 1e3)
    title = (
        f"Decode step, {args.decode_requests} requests of {args.decode_tokens} tokens"
    )
    report(title, {p: s[1:] for p, s in decode.items()}, 1e3)


if __name__ == "__main__":
    main()
