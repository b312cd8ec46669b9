# SPDX-License-Identifier: Apache-2.0
"""What budgets that follow the load do to a burst of requests, and to one alone.

Engines of one policy with fixed budgets and with a range of them get the same requests
in turn, in a pool that holds few of them at the largest budget. Time is that of the
processor, which others may use as well.

    python -m benchmarks.budget_range
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from benchmarks.engines import random_prompts
from benchmarks.tables import OUT, Report, Table
from kvserve import LLM
from kvserve.engine.start.preflight import page_bytes_of
from kvserve.engine.start.support import budgets_of
from kvserve.processor import default_dtype
from kvserve.units import format_bytes, parse_bytes

COLUMNS = ["budget", "alone got", "burst got", "most at once", "preemptions"]
COLUMNS += ["CPU s", "tokens a CPU s", "of the first", "most KV held"]


@dataclass
class Result:
    """What one engine did with a burst.

    Attributes:
        alone: the budget that a request got which came by itself.
        burst: requests of the burst by the budget that they got.
        at_once: the most that ran in one step.
        seconds: of all its threads, till the last reply was done.
        pages: the most that were held.
    """

    budget: str
    alone: str = ""
    burst: dict[str, int] = field(default_factory=dict)
    at_once: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    pages: int = 0


class Server:
    """An engine that is stepped by hand."""

    def __init__(self, budget: str, args: argparse.Namespace) -> None:
        self._budget, self._memory = budget, parse_bytes(args.kv_memory, "--kv-memory")
        llm = LLM(
            args.model,
            policy=f"{args.policy}:budget={budget}",
            dtype=args.dtype,
            max_model_len=args.longest,
            max_num_seqs=args.requests,
            max_num_batched_tokens=1024,
            kv_cache_memory_bytes=self._memory,
            enable_prefix_caching=False,
            enforce_eager=True,
        )
        self._engine: Any = llm.llm_engine
        self._names = list(budgets_of(self._engine.vllm_config))
        self._core = self._engine.engine_core.engine_core
        self._pool = self._core.scheduler.kv_cache_manager.block_pool
        self.page_bytes = page_bytes_of(self._engine.vllm_config)

    def ask(self, prompts: list[list[int]], reply: int) -> Result:
        """Run requests that come all at once."""
        params = SamplingParams(temperature=0, max_tokens=reply, ignore_eos=True)
        result, scheduler = Result(self._budget), self._core.scheduler
        before, start = self._begun(), time.process_time()
        for number, prompt in enumerate(prompts):
            request = {"prompt_token_ids": prompt}
            self._engine.add_request(f"{start}-{number}", request, params)
        asked = list(scheduler.requests.values())
        while self._engine.has_unfinished_requests():
            self._engine.step()
            result.at_once = max(result.at_once, len(scheduler.running))
            result.pages = max(result.pages, self._held())
        result.seconds = time.process_time() - start
        result.preemptions = sum(one.num_preemptions for one in asked)
        result.burst = dict(self._begun() - before) or {self._budget: len(prompts)}
        return result

    def _held(self) -> int:
        return int(self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks())

    def _begun(self) -> Counter[str]:
        """Requests by the budget with which they began, where there is a range."""
        budgets = self._core.kvserve_report()["cache"]["budgets"] or []
        counts = [one["begun"] for one in budgets]
        return Counter(dict(zip(self._names, counts, strict=True)))


def measure(budget: str, args: argparse.Namespace) -> tuple[Result, int]:
    """Start one engine, ask it once, then for the burst.

    Returns:
        What it did, and bytes of a page.
    """
    server = Server(budget, args)
    (warm, *prompts) = random_prompts(args.requests + 1, args.prompt, seed=7)
    alone = server.ask([warm], args.reply)
    result = server.ask(prompts, args.reply)
    result.alone = ", ".join(alone.burst)
    return result, server.page_bytes


def table(results: list[Result], page: int, args: argparse.Namespace) -> Table:
    """A row for each engine, the first being what others are compared with."""
    shown = Table(
        f"{args.requests} requests of {args.prompt} + {args.reply} tokens under "
        f"{args.policy}, pool {args.kv_memory}",
        COLUMNS,
    )
    for one in results:
        got = ", ".join(f"{count} at {name}" for name, count in one.burst.items())
        speed = args.requests * args.reply / one.seconds
        shown.rows.append(
            [
                *(one.budget, one.alone, got),
                *(str(one.at_once), str(one.preemptions)),
                *(f"{one.seconds:.1f}", f"{speed:.1f}"),
                f"{results[0].seconds / one.seconds:.2f}",
                format_bytes(one.pages * page),
            ]
        )
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--policy", default="kvzap")
    budgets = ["50%", "12.5%", "50%..12.5%"]
    parser.add_argument("--budgets", nargs="+", default=budgets, metavar="BUDGET")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--longest", type=int, default=8192, help="of any request")
    parser.add_argument("--kv-memory", default="136MiB")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results, page = [], 0
    for budget in args.budgets:
        result, page = measure(budget, args)
        results.append(result)
    report = Report("budget_range")
    report.tables.append(table(results, page, args))
    report.numbers = {result.budget: asdict(result) for result in results}
    report.write(args.out)


if __name__ == "__main__":
    main()
