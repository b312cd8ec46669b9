# SPDX-License-Identifier: Apache-2.0
"""Compiled attention statistics against the same in PyTorch, side by side in one run.

One layer of the embedded model's shape (9 query heads, 3 KV heads of 64): a chunk of a
prompt, and a decode step of 8 requests. Prints Markdown: medians over the rounds, the
ratio's median and its spread.

    python -m benchmarks.statistics_kernels [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from kvserve.kernels import native
from kvserve.kernels import statistics as plain
from kvserve.kernels.statistics import CachedRows

KV_HEADS, GROUP, WIDTH, PAGE, REQUESTS = 3, 3, 64, 32, 8
SCALE = WIDTH**-0.5
Case = tuple[str, Callable[[], object], Callable[[], object]]


def prefill_cases() -> Iterator[Case]:
    """The second chunk of 2048 tokens."""
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.randn(KV_HEADS * GROUP, 2048, WIDTH).to(dtype)
        key = torch.randn(KV_HEADS, 4096, WIDTH).to(dtype)
        yield (
            f"mass of a chunk, 2048 of 4096, {dtype}".replace("torch.", ""),
            lambda query=query, key=key: plain.attention_mass(query, key, SCALE),
            lambda query=query, key=key: native.attention_mass(query, key, SCALE),
        )


def decode_cases(tokens: int) -> Iterator[Case]:
    """What all requests' lanes of ``tokens`` tokens need in a step, in bfloat16."""
    rows, width = REQUESTS * KV_HEADS, -(-tokens // PAGE)
    pages = rows * width
    table = torch.randperm(pages, dtype=torch.int32).view(rows, width)
    cached = CachedRows(table, torch.full((rows,), tokens), torch.arange(rows), PAGE)
    pool = torch.randn(pages, 2, PAGE * WIDTH).bfloat16()
    keys = pool[:, 0].view(pages, WIDTH, PAGE).transpose(1, 2)
    query = torch.randn(rows, GROUP, WIDTH).bfloat16()
    mass = torch.rand(pages, PAGE)
    yield (
        f"mass of a decode step, {REQUESTS} x {tokens}",
        lambda: plain.add_row_attention(
            query, keys[cached.pages()], cached, SCALE, mass
        ),
        lambda: native.add_row_attention(query, pool, None, cached, SCALE, mass),
    )
    position = torch.randperm(pages * PAGE, dtype=torch.int32).view(pages, PAGE)
    own = torch.full((rows,), pages * PAGE, dtype=torch.int32)
    tokens_state = mass, position, own, own.long() // 2, False
    yield (
        f"eviction in a decode step, {REQUESTS} x {tokens}",
        lambda: plain.lightest_slots(cached, *tokens_state),
        lambda: native.lightest_slots(cached, *tokens_state),
    )


def seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if native.library() is None:
        raise SystemExit(1)
    torch.manual_seed(0)
    print("| case | PyTorch ms | compiled ms | speed-up | min | max |")
    print("|---|---|---|---|---|---|")
    for name, slow, fast in (
        *prefill_cases(),
        *decode_cases(224),
        *decode_cases(1024),
    ):
        repeats = max(int(0.02 / seconds(slow, 3)), 1)
        rounds = [
            (seconds(slow, repeats), seconds(fast, repeats))
            for _ in range(arguments.rounds)
        ]
        times = [
            statistics.median(column) * 1e3 for column in zip(*rounds, strict=True)
        ]
        ratios = [before / after for before, after in rounds]
        shown = statistics.median(ratios), min(ratios), max(ratios)
        cells = [f"{value:.3f}" for value in times] + [f"{r:.1f}" for r in shown]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
