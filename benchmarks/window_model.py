# SPDX-License-Identifier: Apache-2.0
"""A model most of whose layers see a window, beside stock vLLM's hybrid cache.

Layers are those of Gemma 3 1B (4 query heads and one KV head of 256, five of six
layers with a window), fewer of them and of random weights. Decode steps of both
engines take turns one by one, over pools of noise: prompts are scheduled but not
computed, except where reading them is what is measured.

    python -m benchmarks.window_model --contexts 1024 4096 8192 --held 1024 8192 32768

On a machine that others use as well, take one thread and count the processor's time:

    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
    python -m benchmarks.window_model --clock cpu
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from benchmarks.engines import STOCK, TimedEngine
from benchmarks.tables import OUT, Report, Spread, Table
from kvserve.processor import default_dtype
from kvserve.units import parse_bytes

HIDDEN, WARM_UP = 1152, 4

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def write_model(directory: Path, layers: int, window: int, longest: int) -> str:
    """Write the configuration of a model; its weights are drawn as it is loaded."""
    config = Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=HIDDEN,
        intermediate_size=6912,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=window,
        max_position_embeddings=longest,
        architectures=["Gemma3ForCausalLM"],
    )
    config.save_pretrained(directory)
    return str(directory)


class WindowEngine(TimedEngine):
    """An engine whose pool is full of noise, and what requests hold of it."""

    def __init__(
        self, name: str, model: str, options: dict[str, Any], clock: Clock
    ) -> None:
        super().__init__(name, model, options["max_model_len"], options)
        self._clock = clock
        core = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._blocks = self._scheduler.kv_cache_manager.block_pool
        self._idle = self._used_blocks()
        layers = get_layers_from_vllm_config(self._engine.vllm_config, Attention)
        # Layers share memory, each in its own way.
        caches = [layer.kv_cache for layer in layers.values()]
        pools = {cache.untyped_storage().data_ptr(): cache for cache in caches}
        memory = 0
        for pool in pools.values():
            # What nobody has written is one page of zeros to the processor.
            numbers = pool.new_empty(0).set_(pool.untyped_storage())
            memory += numbers.normal_().nbytes
        self._block_bytes = memory / len(self._blocks.blocks)

    def _used_blocks(self) -> int:
        return len(self._blocks.blocks) - 1 - int(self._blocks.get_num_free_blocks())

    @property
    def bytes_held(self) -> float:
        """Bytes of all requests, beside what the engine itself has put aside."""
        return (self._used_blocks() - self._idle) * self._block_bytes

    @property
    def bytes_put_aside(self) -> float:
        """Bytes of the pool that no request can have."""
        return self._idle * self._block_bytes

    def open(self, requests: int, tokens: int, steps: int, seed: int) -> float:
        """Schedule prompts without computing them; return bytes when most were held."""
        self._add(requests, tokens, steps + WARM_UP, seed)
        most, begun = 0.0, set[str]()
        with self.nothing_computed():
            while len(begun) < requests:
                begun |= {output.request_id for output in self._engine.step()}
                most = max(most, self.bytes_held)
        return most

    def step(self) -> float:
        """Give every request a token; return seconds."""
        start = self._clock()
        self._engine.step()
        return self._clock() - start

    def prefill(self, tokens: int, seed: int) -> float:
        self._add(1, tokens, 1, seed)
        start = self._clock()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return self._clock() - start

    def close(self) -> None:
        """Drop all requests."""
        self._engine.abort_request(list(self._scheduler.requests), internal=True)

    @contextmanager
    def nothing_computed(self) -> Iterator[None]:
        """Schedule steps and give out pages, but let no layer run."""
        dtype = self._engine.vllm_config.model_config.dtype

        def zeros(*, positions: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.zeros(len(positions), HIDDEN, dtype=dtype)

        self._runner._model_forward = zeros
        try:
            yield
        finally:
            del self._runner._model_forward


def decode_table(engines: list[WindowEngine], args: argparse.Namespace) -> Table:
    """Time steps of both engines in turns, one by one."""
    title = f"Decode step of {args.requests} requests"
    table = Table(title, ["engine", "tokens", "step, ms", "over stock"])
    for context in args.contexts:
        steps = args.rounds * args.steps + 2 * WARM_UP
        for engine in engines:
            engine.open(args.requests, context, steps, context)
        for _ in range(WARM_UP):
            for engine in engines:
                engine.step()
        times: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for _ in range(args.rounds):
            found = [[each.step() for each in engines] for _ in range(args.steps)]
            for engine, own in zip(engines, zip(*found, strict=True), strict=True):
                times[engine.name].append(statistics.median(own))
        for engine in engines:
            engine.close()
        _add_rows(table, times, context, 1e3)
    return table


def _add_rows(
    table: Table, times: dict[str, list[float]], tokens: int, unit: float
) -> None:
    """Add a row for each engine's seconds, shown in ``1 / unit`` seconds."""
    base = times[STOCK]
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        shown = Spread.of(own).shown(unit), Spread.of(ratios).shown(digits=3)
        table.rows.append([name, str(tokens), *shown])


def prefill_table(engines: list[WindowEngine], args: argparse.Namespace) -> Table:
    """Time prompts of one request, after one to warm up."""
    table = Table("Prefill", ["engine", "tokens", "s", "over stock"])
    for tokens in args.prefill:
        times: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for seed in range(args.prefill_rounds + 1):
            for engine in engines:
                seconds = engine.prefill(tokens, seed)
                if seed:
                    times[engine.name].append(seconds)
        _add_rows(table, times, tokens, 1)
    return table


def held_table(engines: list[WindowEngine], args: argparse.Namespace) -> Table:
    """Count what one request holds, while it is read and behind its prompt."""
    columns = ["engine", "tokens", "MiB", "over stock", "most while read"]
    table = Table("KV bytes of a request", [*columns, "put aside"])
    for tokens in args.held:
        base = 0.0
        for engine in engines:
            most = engine.open(1, tokens, 2 * WARM_UP, tokens)
            with engine.nothing_computed():
                for _ in range(WARM_UP):
                    engine.step()
            held = engine.bytes_held
            base = base or held
            engine.close()
            row = [engine.name, str(tokens), f"{held / 2**20:.2f}"]
            row += [f"{held / base:.3f}", f"{most / 2**20:.2f}"]
            table.rows.append([*row, f"{engine.bytes_put_aside / 2**20:.2f}"])
    return table


def main() -> None:
    """Measure what was asked for, stock vLLM first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["full"], metavar="NAME")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prefill", nargs="*", type=int, default=[4096])
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--held", nargs="*", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    longest = max(*args.contexts, *args.prefill, *args.held, 1024) + 1024
    options = {
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": args.requests,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": parse_bytes(args.kv_memory, "--kv-memory"),
        "enforce_eager": True,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
    }
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory), args.layers, args.window, longest)
        names, clock = [STOCK, *args.engines], CLOCKS[args.clock]
        engines = [WindowEngine(name, model, options, clock) for name in names]
        report = Report("window_model")
        for measure in (held_table, decode_table, prefill_table):
            report.tables.append(measure(engines, args))
        report.write(args.out)


if __name__ == "__main__":
    main()
