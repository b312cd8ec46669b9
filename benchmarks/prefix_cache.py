# SPDX-License-Identifier: Apache-2.0
"""What a cached prefix saves: a shared system prompt, and the turns of a chat.

Every engine has a prefix cache, and a twin without one for the chat; all take turns.
TTFT is the time from a queued request to its first token, of one request alone.

    python -m benchmarks.prefix_cache --engines none full retrieval:budget=0.25
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from benchmarks.engines import STOCK, add_engine_arguments, random_prompts, start_engine
from benchmarks.tables import OUT, Report, Spread, Table, median_ratio
from kvserve.units import format_bytes

KV_MEMORY = 1 << 30
SYSTEM_COLUMNS = ["engine", "TTFT cold ms", "TTFT of a hit ms", "of stock's hit"]
SYSTEM_COLUMNS += ["KV of one", "of stock"]
SYSTEM_COLUMNS += ["all at once s", "tokens read", "KV of all", "of stock"]
CHAT_COLUMNS = ["engine", "TTFT without ms", "TTFT with ms", "speed", "KV held"]
CHAT_COLUMNS += ["of stock"]


@dataclass
class Load:
    """What all requests at once took.

    Attributes:
        seconds: till the last reply was done.
        read: prompt tokens that were computed.
        bytes: held when most were.
    """

    seconds: float = 0.0
    read: int = 0
    bytes: float = 0.0


@dataclass
class Result:
    """What one engine did; times in seconds, one for each request or turn."""

    engine: str
    cold: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    alone_bytes: float = 0.0
    load: Load = field(default_factory=Load)
    chat: list[float] = field(default_factory=list)
    chat_uncached: list[float] = field(default_factory=list)
    chat_bytes: float = 0.0

    @property
    def label(self) -> str:
        return "stock vLLM" if self.engine == STOCK else self.engine


class Server:
    """An engine that is stepped by hand."""

    def __init__(self, name: str, args: argparse.Namespace, caching: bool) -> None:
        options = {
            "dtype": args.dtype,
            "max_model_len": 2 * args.system,
            "max_num_seqs": max(args.requests, 1),
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": KV_MEMORY,
            "enforce_eager": args.eager,
            "enable_prefix_caching": caching,
        }
        self._llm = start_engine(name, args.model, 2 * args.system, options)
        self._engine: Any = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._added = 0
        for prompt in random_prompts(2, 512, seed=99):
            self.ask(prompt, 4)

    def ask(self, prompt: Sequence[int], reply: int) -> tuple[float, list[int], float]:
        """Run one request alone.

        Returns:
            Seconds to its first token, its tokens, and bytes held after the first.
        """
        start = time.perf_counter()
        self._add(prompt, reply)
        first, held, tokens = 0.0, 0.0, list[int]()
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if outputs and not first:
                first, held = time.perf_counter() - start, self.bytes_held
            for output in outputs:
                tokens = list(output.outputs[0].token_ids)
        return first, tokens, held

    def ask_all(self, prompts: Sequence[Sequence[int]], reply: int) -> Load:
        """Run requests that come all at once."""
        load, cached = Load(), dict[str, int]()
        start = time.perf_counter()
        for prompt in prompts:
            self._add(prompt, reply)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                cached[output.request_id] = output.num_cached_tokens or 0
            load.bytes = max(load.bytes, self.bytes_held)
        load.seconds = time.perf_counter() - start
        load.read = sum(map(len, prompts)) - sum(cached.values())
        return load

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._engine.reset_prefix_cache()

    @property
    def pages_held(self) -> int:
        return int(self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks())

    @property
    def bytes_held(self) -> float:
        return self.pages_held * KV_MEMORY / len(self._pool.blocks)

    def _add(self, prompt: Sequence[int], reply: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=reply, ignore_eos=True)
        self._added += 1
        request = {"prompt_token_ids": list(prompt)}
        self._engine.add_request(str(self._added), request, params)


def measure_system_prompt(
    servers: Sequence[Server], results: Sequence[Result], args: argparse.Namespace
) -> None:
    """Ask questions behind one system prompt, one after the other and all at once."""
    for turn in range(args.rounds):
        (system,) = random_prompts(1, args.system, seed=turn)
        questions = random_prompts(1 + args.hits, args.question, seed=1000 + turn)
        for server, result in zip(servers, results, strict=True):
            server.forget()
            asked = [server.ask(system + own, args.reply) for own in questions]
            times, _, held = zip(*asked, strict=True)
            result.cold.append(times[0])
            result.hits += times[1:]
            result.alone_bytes = max(result.alone_bytes, *held)
    (system,) = random_prompts(1, args.system, seed=500)
    own = random_prompts(args.requests, args.question, seed=501)
    for server, result in zip(servers, results, strict=True):
        server.forget()
        result.load = server.ask_all([system + one for one in own], args.reply)


def chat(
    server: Server, args: argparse.Namespace, seed: int
) -> tuple[list[float], float]:
    """Have a chat; return seconds to the first token of turns 2.., and bytes held."""
    text, times, held = list[int](), list[float](), 0.0
    for said in random_prompts(args.turns, args.turn, seed):
        text += said
        seconds, reply, held = server.ask(text, args.reply)
        text += reply
        times.append(seconds)
    return times[1:], held


def measure_chat(
    servers: Sequence[Server], results: Sequence[Result], args: argparse.Namespace
) -> None:
    """Have the same chats with a prefix cache and without, in turns."""
    # All live till the end: vLLM takes its process groups down with any of them.
    twins = [Server(name, args, caching=False) for name in args.engines]
    for seed in range(2000, 2000 + args.rounds):
        for server, twin, result in zip(servers, twins, results, strict=True):
            times, result.chat_bytes = chat(server, args, seed)
            result.chat += times
            result.chat_uncached += chat(twin, args, seed)[0]


def system_table(results: list[Result], args: argparse.Namespace) -> Table:
    """Lay out what a shared system prompt costs, relative to the first engine."""
    title = f"{args.requests} requests behind a system prompt of {args.system} tokens"
    found, first = Table(title, SYSTEM_COLUMNS), results[0]
    for one in results:
        found.rows.append(
            [
                one.label,
                Spread.of(one.cold).shown(1e3, 0),
                Spread.of(one.hits).shown(1e3, 0),
                f"{median_ratio(one.hits, first.hits):.2f}",
                format_bytes(int(one.alone_bytes)),
                f"{one.alone_bytes / first.alone_bytes:.2f}",
                f"{one.load.seconds:.1f}",
                str(one.load.read),
                format_bytes(int(one.load.bytes)),
                f"{one.load.bytes / first.load.bytes:.2f}",
            ]
        )
    return found


def chat_table(results: list[Result], args: argparse.Namespace) -> Table:
    """Lay out turns 2.. of a chat; speed is relative to no prefix cache."""
    title = f"Turns 2 to {args.turns} of a chat, {args.turn} + {args.reply} tokens each"
    found, first = Table(title, CHAT_COLUMNS), results[0]
    for one in results:
        found.rows.append(
            [
                one.label,
                Spread.of(one.chat_uncached).shown(1e3, 0),
                Spread.of(one.chat).shown(1e3, 0),
                f"{median_ratio(one.chat_uncached, one.chat):.2f}",
                format_bytes(int(one.chat_bytes)),
                f"{one.chat_bytes / first.chat_bytes:.2f}",
            ]
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser, [STOCK, "full", "retrieval:budget=0.25"])
    parser.add_argument("--system", type=int, default=3000)
    parser.add_argument("--requests", type=int, default=32, help="0: none")
    parser.add_argument("--question", type=int, default=40)
    parser.add_argument("--reply", type=int, default=32)
    parser.add_argument("--hits", type=int, default=6, help="measured in a round")
    parser.add_argument("--turns", type=int, default=8, help="0: no chat")
    parser.add_argument("--turn", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = [Result(name) for name in args.engines]
    servers = [Server(name, args, caching=True) for name in args.engines]
    report = Report("prefix_cache")
    if args.requests:
        measure_system_prompt(servers, results, args)
        report.tables.append(system_table(results, args))
    if args.turns:
        measure_chat(servers, results, args)
        report.tables.append(chat_table(results, args))
    report.numbers = {result.engine: asdict(result) for result in results}
    report.write(args.out)


if __name__ == "__main__":
    main()
