# SPDX-License-Identifier: Apache-2.0
"""Decode attention of a layer: head pages, stock vLLM's kernel, and the memory bound.

Every request has one query token and ``k`` kept tokens in each of its KV heads. Layers
have pages of their own and run one after the other, as in a model, so that what does
not fit the cache comes from memory. The bound is bytes of keys and values over the
read rate of the same minute.

    python -m benchmarks.attention --kept 512 4096 --requests 1 16 \
      --pages auto int8_per_token_head
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.figures import draw_curves
from benchmarks.tables import OUT, Report, Spread, Table, median_ratio
from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.hardware import cpu_kernels
from kvserve.kernels.huge_pages import use_huge_pages
from kvserve.kernels.page_formats import FORMATS, INT8, PageFormat
from kvserve.processor import default_dtype

OWN, STOCK, BYTE = "auto", "stock", "byte"
LAYERS = 30
PAGE, STOCK_BLOCK = 32, 128
READ_BYTES = 1 << 30
WRITTEN_PAGES = 4096
MOST_BYTES = 1 << 30

Pass = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One size of the problem.

    Attributes:
        requests: requests of one query token each.
        kept: tokens in every KV head of each.
        heads, group, size: KV heads, query heads of each, and their width.
        dtype: of the queries, and of stock vLLM's cache.
    """

    requests: int
    kept: int
    heads: int
    group: int
    size: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.requests * self.heads

    def bytes(self, pages: str = OWN) -> int:
        """Keys and values of a layer, with scales, in pages of a type."""
        token = 2 * self.size * self.dtype.itemsize
        if pages != OWN:
            token = FORMATS[pages].token_bytes(self.size)
        return self.rows * self.kept * token

    @property
    def layers(self) -> int:
        """As many as memory allows, at most those of the embedded model."""
        return max(1, min(LAYERS, MOST_BYTES // self.bytes()))


def pages_of(rows: int, kept: int, page: int, layers: int) -> list[torch.Tensor]:
    """Page tables of each layer, ``[rows, width]``, pages strewn over the pool."""
    width = -(-kept // page)
    ids = torch.randperm(layers * rows * width, dtype=torch.int32)
    return list(ids.view(layers, rows, width).unbind())


def head_pages(case: Case, pages: str) -> Pass:
    """One pass over all layers with the kernels as kvserve calls them."""
    page_format = None if pages == OWN else FORMATS[pages]
    device = cpu_kernels(page_format, case.dtype, case.group, case.size, PAGE)
    tables = pages_of(case.rows, case.kept, PAGE, case.layers)
    stored = page_format or PageFormat(OWN, case.dtype, case.dtype)
    shape = stored.pool_shape(sum(map(torch.numel, tables)), PAGE, case.size)
    pool = torch.empty(shape, dtype=stored.pool)
    use_huge_pages(pool)
    for first in range(0, shape[0], WRITTEN_PAGES):
        slots = torch.arange(first, min(first + WRITTEN_PAGES, shape[0]))
        slots = (slots[:, None] * PAGE + torch.arange(PAGE)).flatten()
        tokens = torch.randn(len(slots), case.size).to(case.dtype)
        device.write(tokens, tokens, pool, slots)
    starts = np.arange(case.rows + 1, dtype=np.int32)
    lengths = np.full(case.rows, case.kept, dtype=np.int32)
    rows = device.plan_rows(RowShapes(case.rows, starts, lengths, np.arange(case.rows)))
    query = torch.randn(case.rows, case.group, case.size).to(case.dtype)
    out, scale = torch.empty_like(query), case.size**-0.5

    def run() -> None:
        for table in tables:
            device.attend(query, pool, rows, table, scale, out)

    return run


def stock(case: Case) -> Pass:
    """The same with vLLM's own blocks: all KV heads of a token in one."""
    tables = pages_of(case.requests, case.kept, STOCK_BLOCK, case.layers)
    blocks = sum(map(torch.numel, tables))
    shape = 2, blocks, case.heads, STOCK_BLOCK, case.size
    pool = torch.randn(shape).to(case.dtype)
    keys, values = pool.unbind()
    starts = torch.arange(case.requests + 1, dtype=torch.int32)
    lengths = torch.full((case.requests,), case.kept, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.requests,
        num_heads=case.heads * case.group,
        num_kv_heads=case.heads,
        head_dim=case.size,
        seq_lens=lengths,
        dtype=case.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(case.dtype, STOCK_BLOCK, case.size, "auto"),
        enable_kv_split=True,
    )
    query = torch.randn(case.requests, case.heads * case.group, case.size).to(
        case.dtype
    )
    out, scale = torch.empty_like(query), case.size**-0.5

    def run() -> None:
        for table in tables:
            ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=keys,
                value_cache=values,
                output=out,
                query_start_loc=starts,
                seq_lens=lengths,
                scale=scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=table,
                softcap=0.0,
                scheduler_metadata=schedule,
                s_aux=None,
            )

    return run


def seconds(run: Pass) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    case: Case, pages: list[str], rounds: int, read: Pass
) -> dict[str, list[float]]:
    """Time a layer with each kernel, and a read of a byte, in turns."""
    runs = {name: head_pages(case, name) for name in pages} | {STOCK: stock(case)}
    found: dict[str, list[float]] = {name: [] for name in (*runs, BYTE)}
    for number in range(rounds + 1):
        timed = {name: seconds(run) / case.layers for name, run in runs.items()}
        timed[BYTE] = seconds(read) / READ_BYTES
        if number:  # the first warms up
            for name, value in timed.items():
                found[name].append(value)
    return found


def reader() -> Pass:
    """Read a gigabyte with all threads."""
    buffer = torch.ones(READ_BYTES // 4)

    def run() -> None:
        buffer.sum()

    return run


def main(options: list[str]) -> None:
    """Measure every size and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kept = [128, 256, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--kept", nargs="+", type=int, default=kept)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--group", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--pages", nargs="+", default=[OWN, INT8.name], metavar="TYPE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(options)
    read, report = reader(), Report("attention")
    table = Table(
        f"Decode attention of a layer, {args.heads} KV heads x {args.group} queries x "
        f"{args.head_size}, {args.dtype}",
        ["rows", "kept", "pages", "MiB", "us", "over the bound", "over stock"],
    )
    curves: dict[str, dict[float, list[float]]] = defaultdict(dict)
    shape = args.heads, args.group, args.head_size, getattr(torch, args.dtype)
    for requests, kept in itertools.product(args.requests, args.kept):
        case = Case(requests, kept, *shape)
        found = measure(case, args.pages, args.rounds, read)
        report.numbers[f"{requests}x{kept}"] = found
        for name in args.pages:
            times, held = found[name], case.bytes(name)
            bound = [byte * held for byte in found[BYTE]]
            table.rows.append(
                [
                    str(case.rows),
                    str(kept),
                    name,
                    f"{held / 2**20:.2f}",
                    Spread.of(times).shown(1e6, 0),
                    f"{median_ratio(times, bound):.2f}",
                    f"{median_ratio(times, found[STOCK]):.2f}",
                ]
            )
            if requests == max(args.requests):
                pairs = zip(times, found[STOCK], strict=True)
                curves[name][kept] = [one / other for one, other in pairs]
    report.tables.append(table)
    report.write(args.out)
    picture = args.out / "attention.png"
    title = f"decode attention of {max(args.requests) * args.heads} rows"
    draw_curves(curves, picture, title, "kept tokens", "time over stock vLLM's")
