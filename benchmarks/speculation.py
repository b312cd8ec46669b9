# SPDX-License-Identifier: Apache-2.0
"""What guessed tokens gain where a model copies, each engine beside one that guesses.

The prompt says a list again and again; the model goes on. n-grams of the text are
guessed, without a model, so that what they gain is known: tokens of a step. Decode
tokens a second are counted from the first token to the last; all engines take turns.

    python -m benchmarks.speculation --eager
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.platforms import current_platform

from benchmarks.engines import STOCK, add_engine_arguments, start_engine
from benchmarks.tables import OUT, Report, Spread, Table, median_ratio

KV_MEMORY = 1 << 28
COLUMNS = ["engine", "tokens/s without", "with", "gain", "of stock's gain"]
COLUMNS += ["tokens a step", "replies alike"]


@dataclass
class Runs:
    """What one engine did, a number for each round.

    Attributes:
        speed: decode tokens a second.
        per_step: tokens that a request got in a step.
        replies: of each round and request.
    """

    speed: list[float] = field(default_factory=list)
    per_step: list[float] = field(default_factory=list)
    replies: list[list[list[int]]] = field(default_factory=list)


@dataclass
class Result:
    """An engine without guesses, and its twin with them."""

    engine: str
    plain: Runs = field(default_factory=Runs)
    guessing: Runs = field(default_factory=Runs)

    @property
    def gains(self) -> list[float]:
        pairs = zip(self.guessing.speed, self.plain.speed, strict=True)
        return [fast / slow for fast, slow in pairs]

    @property
    def alike(self) -> str:
        """Replies that guesses did not change."""
        pairs = [
            (one, other)
            for both in zip(self.plain.replies, self.guessing.replies, strict=True)
            for one, other in zip(*both, strict=True)
        ]
        return f"{sum(one == other for one, other in pairs)} of {len(pairs)}"


class Server:
    """An engine that is stepped by hand."""

    def __init__(self, name: str, args: argparse.Namespace, guesses: int) -> None:
        options: dict[str, Any] = {
            "dtype": args.dtype,
            "max_model_len": args.prompt + args.reply + 32,
            "max_num_seqs": args.requests,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": KV_MEMORY,
            "enforce_eager": args.eager,
        }
        if guesses:
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": guesses,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            }
        tokens = args.prompt + args.reply
        llm = start_engine(name, args.model, tokens, options)
        self._tokenizer, self._engine = llm.get_tokenizer(), llm.llm_engine
        self._added = 0

    def prompts(self, args: argparse.Namespace, seed: int) -> list[list[int]]:
        """Lists that are said again and again, cut to their length."""
        return [
            self._prompt(args.prompt, args.entries, seed * args.requests + number)
            for number in range(args.requests)
        ]

    def _prompt(self, tokens: int, entries: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        words = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron")
        lines = [
            f"{number}. {' '.join(rng.sample(words, 3))} {rng.randrange(100, 1000)}\n"
            for number in range(1, entries + 1)
        ]
        text = "".join(lines)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        said = ids * (tokens // len(ids) + 2)
        return said[-tokens - len(ids) : -len(ids)]

    def run(self, prompts: Sequence[Sequence[int]], reply: int, runs: Runs) -> None:
        """Have all prompts answered at once, and note what it took."""
        params = SamplingParams(temperature=0, max_tokens=reply, ignore_eos=True)
        names = [f"{self._added + number}" for number in range(len(prompts))]
        self._added += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            request = {"prompt_token_ids": list(prompt)}
            self._engine.add_request(name, request, params)
        said: dict[str, list[int]] = {}
        while len(said) < len(prompts):
            self._step(said)
        before, start, steps = sum(map(len, said.values())), time.perf_counter(), 0
        while self._engine.has_unfinished_requests():
            steps += self._step(said)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, said.values())) - before
        runs.speed.append(tokens / seconds)
        runs.per_step.append(tokens / steps)
        runs.replies.append([said[name] for name in names])

    def _step(self, said: dict[str, list[int]]) -> int:
        """Note what each request has said so far; count those that went on."""
        outputs = self._engine.step()
        for output in outputs:
            said[output.request_id] = list(output.outputs[0].token_ids)
        return len(outputs)


def _register_kernels_once() -> None:
    """Let several engines of one process guess.

    At every start vLLM looks for Triton's kernels in all modules, and trips over one
    that guessing by n-grams has imported.
    """
    platform = type(current_platform)
    register = functools.cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(register)


def measure(args: argparse.Namespace) -> list[Result]:
    """Let engines and their twins take turns."""
    _register_kernels_once()
    results = [Result(name) for name in args.engines]
    servers = [
        [Server(name, args, guesses) for guesses in (0, args.guesses)]
        for name in args.engines
    ]
    for turn in range(-1, args.rounds):
        prompts = servers[0][0].prompts(args, turn + 1)
        for pair, result in zip(servers, results, strict=True):
            for server, runs in zip(pair, (result.plain, result.guessing), strict=True):
                # The first round is for what is compiled when it is first needed.
                of_turn = runs if turn >= 0 else Runs()
                server.run(prompts, args.reply, of_turn)
    return results


def table(results: Sequence[Result], args: argparse.Namespace) -> Table:
    """Lay out what guesses gain, beside the first engine."""
    found = Table(
        f"{args.requests} at once go on with a list of {args.entries} lines, prompts "
        f"of {args.prompt} tokens, replies of {args.reply}, {args.guesses} guesses",
        COLUMNS,
    )
    first = results[0]
    for one in results:
        found.rows.append(
            [
                "stock vLLM" if one.engine == STOCK else one.engine,
                Spread.of(one.plain.speed).shown(digits=1),
                Spread.of(one.guessing.speed).shown(digits=1),
                Spread.of(one.gains).shown(),
                f"{median_ratio(one.gains, first.gains):.2f}",
                Spread.of(one.guessing.per_step).shown(),
                one.alike,
            ]
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = [STOCK, "full", "retrieval:budget=25%", "kvzap:budget=12.5%"]
    add_engine_arguments(parser, engines)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--reply", type=int, default=256)
    parser.add_argument("--entries", type=int, default=24)
    parser.add_argument("--guesses", type=int, default=4, help="tokens, in a step")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    report = Report("speculation")
    results = measure(args)
    report.tables.append(table(results, args))
    report.numbers = {result.engine: asdict(result) for result in results}
    report.write(args.out)


if __name__ == "__main__":
    main()
