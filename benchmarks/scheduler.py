# SPDX-License-Identifier: Apache-2.0
"""Host time of page accounting and metadata, for small and very large models.

No weights and no attention: the page manager in vLLM's block pool, vLLM's own block
table, the worker's page tables and the rows of a step, with as many requests and
tokens as asked. A fifth of the heads keep everything, the others 32 + 480 tokens.

    python -m benchmarks.scheduler --models 8B --contexts 32768 --requests 1 64
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.v1.core.block_pool import BlockPool

from benchmarks.figures import draw_curves
from benchmarks.tables import OUT, Report, Spread, Table
from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.batch.rows import RowBuilder
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.spec import HeadPagedSpec
from kvserve.plan.streaming import StreamRule
from policies.base import Capabilities, HeadBudget, ModelShape, StreamingPolicy

MODELS = {
    "135M": ModelShape("SmolLM2-135M", 30, 9, 3, 64),
    "8B": ModelShape("8B", 32, 32, 8, 128),
    "70B": ModelShape("70B", 80, 64, 8, 128),
}
PAGE, CHUNK, STEPS = 32, 2048, 64
MOST_PAGES = 6_000_000
"""Pages that this machine's memory has room for: vLLM has an object for each."""


@dataclass(frozen=True)
class EveryFifth(StreamingPolicy):
    """Every fifth head keeps everything."""

    name = "every-fifth"
    capabilities = Capabilities(prefill="streaming", position_only=True)

    def budgets(
        self, model: ModelShape, max_tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        heads = range(model.num_kv_heads)
        return tuple(
            tuple(
                HeadBudget() if (layer + head) % 5 == 0 else HeadBudget(32, 480)
                for head in heads
            )
            for layer in range(model.num_layers)
        )


class Host:
    """What scheduler and worker keep of a pool and its requests."""

    def __init__(self, rule: StreamRule, requests: int) -> None:
        plan, most = rule.longest, rule.max_tokens
        pages = plan.pages(most)
        spec = HeadPagedSpec(
            block_size=PAGE,
            num_kv_heads=1,
            head_size=rule.model.head_size,
            dtype=torch.bfloat16,
            plan=plan,
            rule=rule,
            num_scratch_pages=0,
        )
        pool = BlockPool(requests * pages + 1, False, PAGE)
        self._manager = HeadPagedManager(
            spec,
            block_pool=pool,
            enable_caching=False,
            kv_cache_group_id=0,
            scheduler_block_size=PAGE,
        )
        self._tables = PageTables(plan, requests, most)
        self._rows = RowBuilder(plan, self._tables)
        self._lists = np.zeros((requests, pages), dtype=np.int32)
        self._filled = [0] * requests
        self._names: list[str] = []
        self._lens = np.zeros(0, dtype=np.int64)

    def read_prompt(self, tokens: int) -> float:
        """Give a new request its pages, chunk by chunk; return seconds."""
        row, name = len(self._names), str(len(self._names))
        self._names.append(name)
        self._lens = np.append(self._lens, 0)
        start = time.perf_counter()
        for computed in range(0, tokens, CHUNK):
            now = min(computed + CHUNK, tokens)
            self._allocate(row, name, now)
            self._lens[row] = now
            self._refresh()
        return time.perf_counter() - start

    def decode(self) -> float:
        """Do what a decode step needs of the host; return seconds."""
        self._lens += 1
        start = time.perf_counter()
        for row, name in enumerate(self._names):
            self._allocate(row, name, int(self._lens[row]))
        self._refresh()
        starts = np.arange(len(self._names) + 1, dtype=np.int64)
        self._rows.build(starts, self._lens)
        return time.perf_counter() - start

    def _allocate(self, row: int, name: str, tokens: int) -> None:
        # The calls of KVCacheManager.allocate_slots, and what the runner does then.
        self._manager.get_num_blocks_to_allocate(name, tokens, (), 0, 0, tokens)
        pages = self._manager.allocate_new_blocks(name, tokens, tokens)
        if pages:
            end = self._filled[row] + len(pages)
            self._lists[row, self._filled[row] : end] = [p.block_id for p in pages]
            self._filled[row] = end

    def _refresh(self) -> None:
        computed = self._lens - 1
        self._tables.refresh(self._names, self._lists, self._lens, computed)


def measure(model: str, context: int, requests: int) -> dict[str, Any] | None:
    """Measure a size, or return nothing where there is no room for it."""
    rule = StreamRule(EveryFifth(), MODELS[model], PAGE, context + STEPS)
    pages = rule.pages(context)
    if pages * requests > MOST_PAGES:
        return None
    host = Host(rule, requests)
    prompts = [host.read_prompt(context) for _ in range(requests)]
    steps = [host.decode() for _ in range(STEPS)]
    table_bytes = host._tables.by_slot.nbytes + host._tables.ordered.nbytes
    return {
        "pages": pages,
        "prompt": prompts,
        "step": steps,
        "table_bytes": table_bytes,
    }


def _cells(model: str, context: int, requests: int, found: Any) -> list[str]:
    size = [model, str(context), str(requests)]
    if found is None:
        return [*size, "more pages than fit here", "", "", ""]
    return [
        *size,
        str(found["pages"]),
        Spread.of(found["prompt"]).shown(1e3, 1),
        Spread.of(found["step"]).shown(1e3),
        f"{found['table_bytes'] / 2**20:.0f}",
    ]


def main() -> None:
    """Measure every size and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--contexts", nargs="+", type=int, default=[8192, 32768, 131072])
    add("--requests", nargs="+", type=int, default=[1, 16, 64, 256])
    add("--out", type=Path, default=OUT)
    args = parser.parse_args()
    report = Report("scheduler")
    columns = ["model", "context", "requests", "pages a request"]
    columns += ["prompt, ms", "decode step, ms", "tables, MiB"]
    table = Table("Host time of page accounting and metadata", columns)
    sizes = [
        (m, c, r) for m in args.models for c in args.contexts for r in args.requests
    ]
    curves: dict[str, dict[float, list[float]]] = {}
    for model, context, requests in tqdm(sizes):
        size = model, context, requests
        found = measure(*size)
        if found is not None:
            curve = curves.setdefault(f"{model}, {context} tokens", {})
            curve[requests] = [1e3 * statistics.median(found["step"])]
        table.rows.append(_cells(*size, found))
        report.numbers["x".join(map(str, size))] = found
    report.tables.append(table)
    report.write(args.out)
    picture, title = args.out / "scheduler.png", "host time of a decode step"
    draw_curves(curves, picture, title, "requests", "milliseconds, median")


if __name__ == "__main__":
    main()
