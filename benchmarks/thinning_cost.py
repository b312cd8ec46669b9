# SPDX-License-Identifier: Apache-2.0
"""What judging and moving tokens costs a prefill, and what is held on the way.

    python -m benchmarks.thinning_cost [--lengths 4096 8192] [--chunk 512]

Shares of time are of the prefill that they are part of, so that others on the machine
lengthen both. Pages are shares of those that a full cache has at the prompt's end.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from benchmarks.engines import random_prompts, start_engine
from benchmarks.tables import OUT, Report, Spread, Table
from kvserve.processor import default_dtype

COLUMNS = ["policy", "tokens", "judging", "moving", "held at most", "held at the end"]
_REPLY = 32
POLICIES = ["kvzap", "expected-attention", "keydiff", "knorm"]


@dataclass(frozen=True)
class Reading:
    """Of one prompt: seconds, and shares of a full cache."""

    seconds: float
    judging: float
    moving: float
    peak: float
    end: float


def read(llm: Any, tokens: int, seed: int) -> Reading:
    """Read a prompt of ``tokens`` tokens, and say as many as let a page be full."""
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    (manager,) = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    worker = core.model_executor.driver_worker.worker
    before = worker.usage()
    (prompt,) = random_prompts(1, tokens, seed)
    params = SamplingParams(temperature=0, max_tokens=_REPLY, ignore_eos=True)
    engine.add_request(f"{seed}", {"prompt_token_ids": prompt}, params)
    start = time.perf_counter()
    while not any(output.outputs for output in engine.step()):
        pass
    seconds, after = time.perf_counter() - start, worker.usage()
    while engine.has_unfinished_requests():
        engine.step()
    (receipt, *_) = manager.ledger.receipts({})
    return Reading(
        seconds,
        (after.selection_seconds - before.selection_seconds) / seconds,
        (after.compaction_seconds - before.compaction_seconds) / seconds,
        receipt.pages_peak / receipt.pages_full,
        receipt.pages_held / receipt.pages_full,
    )


def measure(name: str, length: int, args: argparse.Namespace) -> list[Reading]:
    """Read some prompts of one length under one policy."""
    options = {
        "dtype": args.dtype,
        "max_model_len": length,
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 30,
        "enforce_eager": True,
    }
    llm = start_engine(f"{name}:budget={args.budget}", args.model, length, options)
    readings = [read(llm, length - _REPLY, seed) for seed in range(args.rounds + 1)]
    return readings[1:]


def main() -> None:
    """Print a table of all policies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--budget", default="12.5%")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    table = Table(f"Thinning to {args.budget}, steps of {args.chunk} tokens", COLUMNS)
    report = Report("thinning_cost", [table])
    for length in args.lengths:
        for name in args.policies:
            readings = measure(name, length, args)
            report.numbers[f"{name} {length}"] = [asdict(one) for one in readings]
            shares = [
                Spread.of([getattr(one, part) for one in readings]).shown(100, 1)
                for part in ("judging", "moving")
            ]
            held = [f"{readings[0].peak:.1%}", f"{readings[0].end:.1%}"]
            table.rows.append([name, f"{length}", *(f"{s} %" for s in shares), *held])
    report.write(args.out)


if __name__ == "__main__":
    main()
