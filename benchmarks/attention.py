# SPDX-License-Identifier: Apache-2.0
"""Decode attention of a layer: head pages, stock vLLM's kernel, and the memory bound.

Every request has one query token and ``k`` kept tokens in each of its KV heads. Layers
have pages of their own and run one after the other, as in a model, so that what does
not fit the cache comes from memory. The bound is bytes of keys and values over the
read rate of the same minute. ``benchmarks.gpu_rows`` times the Triton kernels.

    python -m benchmarks.attention --kept 512 4096 --requests 1 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tables import OUT, Report, Spread, Table, median_ratio

LAYERS = 30
PAGE, STOCK_BLOCK = 32, 128
READ_BYTES = 1 << 30
MOST_BYTES = 1 << 30

Pass = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One size of the problem.

    Attributes:
        requests: requests of one query token each.
        kept: tokens in every KV head of each.
        heads, group, size: KV heads, query heads of each, and their width.
    """

    requests: int
    kept: int
    heads: int
    group: int
    size: int

    @property
    def rows(self) -> int:
        return self.requests * self.heads

    @property
    def bytes(self) -> int:
        """Keys and values of a layer, in two-byte numbers."""
        return self.rows * self.kept * self.size * 2 * 2

    @property
    def layers(self) -> int:
        """As many as memory allows, at most those of the embedded model."""
        return max(1, min(LAYERS, MOST_BYTES // self.bytes))


def pages_of(rows: int, kept: int, page: int, layers: int) -> list[torch.Tensor]:
    """Page tables of each layer, ``[rows, width]``, pages strewn over the pool."""
    width = -(-kept // page)
    ids = torch.randperm(layers * rows * width, dtype=torch.int32)
    return list(ids.view(layers, rows, width).unbind())


def head_pages(case: Case) -> Pass:
    """One pass over all layers with the kernels as kvserve calls them."""
    import numpy as np

    from kvserve.engine.device import CPUDevice
    from kvserve.engine.rows import RowShapes

    device = CPUDevice(torch.bfloat16, case.group, case.size, PAGE)
    tables = pages_of(case.rows, case.kept, PAGE, case.layers)
    pool = torch.randn(sum(map(torch.numel, tables)), 1, PAGE, 2 * case.size).bfloat16()
    starts = np.arange(case.rows + 1, dtype=np.int32)
    lengths = np.full(case.rows, case.kept, dtype=np.int32)
    rows = device.plan_rows(RowShapes(case.rows, starts, lengths, np.arange(case.rows)))
    query = torch.randn(case.rows, case.group, case.size).bfloat16()
    out, scale = torch.empty_like(query), case.size**-0.5

    def run() -> None:
        for table in tables:
            device.attend(query, pool, rows, table, scale, out)

    return run


def stock(case: Case) -> Pass:
    """The same with vLLM's own blocks: all KV heads of a token in one."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    tables = pages_of(case.requests, case.kept, STOCK_BLOCK, case.layers)
    blocks = sum(map(torch.numel, tables))
    pool = torch.randn(2, blocks, case.heads, STOCK_BLOCK, case.size).bfloat16()
    keys, values = pool.unbind()
    starts = torch.arange(case.requests + 1, dtype=torch.int32)
    lengths = torch.full((case.requests,), case.kept, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.requests,
        num_heads=case.heads * case.group,
        num_kv_heads=case.heads,
        head_dim=case.size,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(torch.bfloat16, STOCK_BLOCK, case.size, "auto"),
        enable_kv_split=True,
    )
    query = torch.randn(case.requests, case.heads * case.group, case.size).bfloat16()
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


def measure(case: Case, rounds: int, read: Pass) -> dict[str, list[float]]:
    """Time a layer with each kernel, and a read of as many bytes, in turns."""
    runs = {"kvserve": head_pages(case), "stock": stock(case)}
    found: dict[str, list[float]] = {name: [] for name in (*runs, "bound")}
    for number in range(rounds + 1):
        read_seconds = seconds(read) * case.bytes / READ_BYTES
        timed = {name: seconds(run) / case.layers for name, run in runs.items()}
        if number:  # the first warms up
            found["bound"].append(read_seconds)
            for name, value in timed.items():
                found[name].append(value)
    return found


def reader() -> Pass:
    """Read a gigabyte with all threads."""
    buffer = torch.ones(READ_BYTES // 4)

    def run() -> None:
        buffer.sum()

    return run


def main() -> None:
    """Measure on the device that ``--device`` names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen, options = parser.parse_known_args()
    if chosen.device == "cuda":
        from benchmarks import gpu_rows

        gpu_rows.main(options)
    else:
        on_cpu(options)


def on_cpu(options: list[str]) -> None:
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(options)
    read, report = reader(), Report("attention")
    table = Table(
        f"Decode attention of a layer, {args.heads} KV heads x {args.group} queries x "
        f"{args.head_size}, bfloat16",
        ["rows", "kept", "MiB", "kvserve us", "over the bound", "over stock"],
    )
    for requests in args.requests:
        for kept in args.kept:
            case = Case(requests, kept, args.heads, args.group, args.head_size)
            found = measure(case, args.rounds, read)
            table.rows.append(
                [
                    str(case.rows),
                    str(kept),
                    f"{case.bytes / 2**20:.2f}",
                    Spread.of(found["kvserve"]).shown(1e6, 0),
                    f"{median_ratio(found['kvserve'], found['bound']):.2f}",
                    f"{median_ratio(found['kvserve'], found['stock']):.2f}",
                ]
            )
            report.numbers[f"{requests}x{kept}"] = found
    report.tables.append(table)
    report.write(args.out)


if __name__ == "__main__":
    main()
