# SPDX-License-Identifier: Apache-2.0
"""Long prompts on a small pool: how many run at once, and how long it all takes.

Every engine gets the same requests and the same bytes of KV cache, one engine after
the other in one run. Prints Markdown and draws a picture of it.

    python -m benchmarks.load --policies none full retrieval --image docs/load.png
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tqdm import tqdm
from vllm import SamplingParams

from kvserve import LLM
from kvserve.units import parse_bytes


@dataclass
class Result:
    """What one engine did: seconds, requests and tokens."""

    policy: str
    seconds: float = 0.0
    output_tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    timeline: list[tuple[float, int]] = field(default_factory=list)

    @property
    def most_running(self) -> int:
        return max(running for _, running in self.timeline)


def run(policy: str, args: argparse.Namespace) -> Result:
    """Serve the whole load with one engine; ``none`` is stock vLLM."""
    llm: Any = LLM(
        args.model,
        policy=None if policy == "none" else policy,
        max_model_len=args.prompt + args.output + 64,
        max_num_seqs=args.requests,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=parse_bytes(args.kv_memory, "--kv-memory"),
        enable_prefix_caching=False,
    )
    engine = llm.llm_engine
    tokens = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    for number in range(args.requests):
        ids = [tokens.randrange(100, 40000) for _ in range(args.prompt)]
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    result, seen = Result(policy), set[str]()
    scheduler = engine.engine_core.engine_core.scheduler
    bar = tqdm(total=args.requests * args.output, desc=policy, unit="tok")
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        result.timeline.append((now, len(scheduler.running)))
        fresh = {o.request_id for o in outputs} - seen
        result.first_token += [now] * len(fresh)
        seen |= fresh
        bar.update(len(outputs))
    bar.close()
    result.seconds = time.perf_counter() - start
    result.output_tokens = args.requests * args.output
    del llm, engine, scheduler
    gc.collect()
    return result


def report(results: list[Result], args: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"\n### {args.requests} requests of {args.prompt} + {args.output} tokens, "
        f"{args.kv_memory} of KV cache\n\n"
        "| engine | total s | speed | output tok/s | mean TTFT s | most at once |\n"
        "|---|---|---|---|---|---|"
    )
    for result in results:
        print(
            f"| {_label(result)} | {result.seconds:.0f} "
            f"| {results[0].seconds / result.seconds:.2f} "
            f"| {result.output_tokens / result.seconds:.1f} "
            f"| {statistics.mean(result.first_token):.0f} | {result.most_running} |"
        )


def draw(results: list[Result], args: argparse.Namespace) -> None:
    """Draw how many requests each engine runs over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    colours = itertools.cycle(("#888888", "#4477aa", "#cc3311", "#228833"))
    for result, colour in zip(results, colours, strict=False):
        seconds, running = zip(*result.timeline, strict=True)
        axes.fill_between(
            [0.0, *seconds], [0, *running], step="pre", alpha=0.3, color=colour
        )
        label = f"{_label(result)}: {result.seconds:.0f} s"
        axes.step([0.0, *seconds], [0, *running], color=colour, label=label)
    axes.set(
        xlabel="seconds",
        ylabel="requests running",
        ylim=(0, args.requests + 1),
        title=f"{args.requests} requests of {args.prompt} + {args.output} tokens in "
        f"{args.kv_memory} of KV cache",
    )
    axes.legend(loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.image, dpi=150)


def _label(result: Result) -> str:
    return "stock vLLM" if result.policy == "none" else f"kvserve {result.policy}"


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--policies", nargs="+", default=["none", "retrieval"])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--output", type=int, default=384)
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--image", help="write a PNG here")
    args = parser.parse_args()
    results = [run(policy, args) for policy in args.policies]
    report(results, args)
    if args.image:
        draw(results, args)


if __name__ == "__main__":
    main()
