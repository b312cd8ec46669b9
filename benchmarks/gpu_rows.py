# SPDX-License-Identifier: Apache-2.0
"""Attention over head pages on a GPU, against dense attention and the copy bandwidth.

One layer of the shape of Llama-3-8B (32 query heads, 8 KV heads of 128, bfloat16):
decode with everything kept, with an eighth kept in every head and with an eighth of
the heads full, prefill of one chunk with full and with bounded heads. Speed-ups are
over the fastest dense attention of PyTorch, FlashAttention among them, on the full
cache, or over full heads where there is none.

    python -m benchmarks.attention --device cuda [--context 32768] [--kept 0.125]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.tables import OUT, Report, Table
from kvserve.kernels import triton_rows

DEVICE = "cuda"
DTYPE = torch.bfloat16
QUERY_HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
GROUP = QUERY_HEADS // KV_HEADS
SCALE = HEAD_SIZE**-0.5
SINKS, RECENT, QUERY_BLOCK = 32, 480, 64
COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile of the repetitions."""

    median: float
    low: float
    high: float

    def shown(self) -> list[str]:
        half = (self.high - self.low) / 2
        return [f"{self.median * 1e3:.1f}", f"± {half / self.median:.1%}"]


def measure(run: Callable[[], object]) -> Timing:
    """Time replays of a CUDA graph of ``run``: the GPU's time, without launching."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # do_bench flushes the L2 cache before every repetition.
    times = triton.testing.do_bench(
        graph.replay, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8]
    )
    return Timing(*times)


def copy_bandwidth() -> float:
    """Bytes a millisecond of a device-to-device copy, reads and writes counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / measure(lambda: target.copy_(source)).median


@dataclass(frozen=True)
class Rows:
    """One call of ``row_attention``: lengths of the rows and their random pages."""

    q_lens: Tensor
    seq_lens: Tensor
    page_size: int

    @property
    def kept_bytes(self) -> int:
        return int(self.seq_lens.sum()) * 2 * HEAD_SIZE * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of both matrix products, over the (query, key) pairs that are visible."""
        queries = self.q_lens.long()
        pairs = queries * self.seq_lens - queries * (queries - 1) // 2
        return int(pairs.sum()) * 4 * GROUP * HEAD_SIZE

    def attention(self) -> Callable[[], object]:
        pages = -(-self.seq_lens // self.page_size)
        used = int(pages.sum())
        shape = used, 1, self.page_size, 2 * HEAD_SIZE
        pool = torch.randn(shape, dtype=DTYPE, device=DEVICE)
        page_table = torch.zeros(len(pages), int(pages.max()), dtype=torch.int32)
        order = torch.randperm(used, dtype=torch.int32)
        for row, own in enumerate(order.split_with_sizes(pages.tolist())):
            page_table[row, : len(own)] = own
        query = torch.randn(
            int(self.q_lens.sum()), GROUP, HEAD_SIZE, dtype=DTYPE, device=DEVICE
        )
        out = torch.empty_like(query)
        query_start = torch.cat([torch.zeros(1), self.q_lens.cumsum(0)])
        rows = (
            query_start.int().to(DEVICE),
            self.seq_lens.int().to(DEVICE),
            page_table.to(DEVICE),
        )
        longest = int(self.q_lens.max())
        return lambda: triton_rows.row_attention(
            query, pool, *rows, SCALE, out, longest
        )


def decode_rows(
    requests: int, context: int, least: int, full_share: float, page_size: int
) -> Rows:
    """A token of every request; of the (request, head) rows, ``full_share`` keep all
    tokens and the others ``least``."""
    rows = requests * KV_HEADS
    seq_lens = torch.full((rows,), min(context, least))
    seq_lens[torch.randperm(rows)[: round(full_share * rows)]] = context
    return Rows(torch.ones(rows, dtype=torch.int64), seq_lens, page_size)


def prefill_rows(chunk: int, context: int, bounded: bool, page_size: int) -> Rows:
    """The last ``chunk`` of ``context`` tokens of one request: its heads all full, or
    all bounded, so that every block of queries is a row."""
    if not bounded:
        chunks = torch.full((KV_HEADS,), chunk)
        return Rows(chunks, torch.full((KV_HEADS,), context), page_size)
    ends = torch.arange(context - chunk, context, QUERY_BLOCK) + QUERY_BLOCK
    seq_lens = ends.clamp(max=SINKS + RECENT + QUERY_BLOCK).repeat(KV_HEADS)
    return Rows(torch.full_like(seq_lens, QUERY_BLOCK), seq_lens, page_size)


def dense_attention(
    requests: int, queries: int, context: int, fold: bool, flash: bool = False
) -> Callable[[], object]:
    """PyTorch's attention on contiguous K and V. ``fold`` lays the heads of a group
    out as queries of one head: for decode it then reads K and V once, not G times.
    ``flash`` takes FlashAttention, whatever PyTorch would choose."""
    heads = (KV_HEADS, queries * GROUP) if fold else (QUERY_HEADS, queries)
    query = torch.randn(requests, *heads, HEAD_SIZE, dtype=DTYPE, device=DEVICE)
    shape = 2, requests, KV_HEADS, context, HEAD_SIZE
    key, value = torch.randn(shape, dtype=DTYPE, device=DEVICE)

    def run() -> object:
        return scaled_dot_product_attention(
            query, key, value, is_causal=queries > 1, scale=SCALE, enable_gqa=not fold
        )

    def run_flash() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return run()

    return run_flash if flash else run


def line(name: str, timing: Timing, baseline: float, achieved: str) -> list[str]:
    return [name, *timing.shown(), f"{baseline / timing.median:.2f}x", achieved]


def decode_table(
    requests: int, context: int, kept: float, page_size: int, bandwidth: float
) -> list[list[str]]:
    """Lines for one decode step: time, ratio to the best dense one, bandwidth."""
    dense = {
        "dense, SDPA": dense_attention(requests, 1, context, fold=False),
        "dense, SDPA, folded": dense_attention(requests, 1, context, fold=True),
        "dense, FlashAttention": dense_attention(
            requests, 1, context, fold=True, flash=True
        ),
    }
    timings = {name: measure(run) for name, run in dense.items()}
    baseline = min(timing.median for timing in timings.values())

    def floor(timing: Timing, kept_bytes: int) -> str:
        return f"{kept_bytes / bandwidth / timing.median:.0%} of copy bandwidth"

    sizes = requests, context
    everything = decode_rows(*sizes, context, 1.0, page_size)
    title = f"decode {requests} x {context}: "
    lines = [
        line(title + name, timing, baseline, floor(timing, everything.kept_bytes))
        for name, timing in timings.items()
    ]
    part = round(kept * context)
    for name, rows in [
        ("head pages, all kept", everything),
        (f"head pages, {kept:.1%} kept", decode_rows(*sizes, part, 0.0, page_size)),
        (
            f"head pages, {kept:.1%} of heads full",
            decode_rows(*sizes, SINKS + RECENT, kept, page_size),
        ),
    ]:
        timing = measure(rows.attention())
        achieved = floor(timing, rows.kept_bytes)
        lines.append(line(title + name, timing, baseline, achieved))
    return lines


def prefill_table(chunk: int, context: int, page_size: int) -> list[list[str]]:
    """Lines for one chunk: time, ratio to full heads, matrix rate."""

    def rate(timing: Timing, flops: int) -> str:
        return f"{flops / timing.median / 1e9:.0f} TFLOP/s"

    full = prefill_rows(chunk, context, False, page_size)
    bounded = prefill_rows(chunk, context, True, page_size)
    title = f"prefill {chunk} of {context}: "
    timings = {"full heads": (measure(full.attention()), full.flops)}
    timings["bounded heads"] = measure(bounded.attention()), bounded.flops
    if chunk == context:  # PyTorch's causal mask fits no later chunk
        timing = measure(dense_attention(1, chunk, context, fold=False))
        timings["dense"] = timing, full.flops
    baseline = timings["dense" if "dense" in timings else "full heads"][0].median
    return [
        line(title + name, timing, baseline, rate(timing, flops))
        for name, (timing, flops) in timings.items()
    ]


def tables(arguments: argparse.Namespace) -> list[list[str]]:
    """Lines of everything that is measured."""
    bandwidth, page_size = copy_bandwidth(), arguments.page_size
    lines: list[list[str]] = []
    for context in arguments.context:
        sizes = arguments.requests, context, arguments.kept
        lines += decode_table(*sizes, page_size, bandwidth)
        chunk = arguments.chunk
        lines += prefill_table(chunk, chunk, page_size)
        lines += prefill_table(chunk, context, page_size) if context > chunk else []
    return lines


def main(options: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", nargs="+", type=int, default=[32768])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--kept", type=float, default=0.125, help="share of the cache")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(options)
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu_rows: needs an NVIDIA GPU\n")
    torch.manual_seed(0)
    title = f"{torch.cuda.get_device_name()}, pages of {arguments.page_size} tokens"
    columns = ["case", "median us", "spread", "speed-up", "achieved"]
    report = Report("gpu_rows")
    report.tables.append(Table(title, columns, tables(arguments)))
    report.write(arguments.out)


if __name__ == "__main__":
    main()
