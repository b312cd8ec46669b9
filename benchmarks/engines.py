# SPDX-License-Identifier: Apache-2.0
"""Engines that take turns in one process, and what a step of theirs takes.

Engines are named as ``kvserve eval`` names policies, ``NAME[:KEY=VALUE,...]``, where
``budget=`` is of a decode request; ``none[:OPTION=VALUE,...]`` is stock vLLM with some
of its options, and ``weights`` stock vLLM whose attention does nothing: the time that
no cache policy can go below. A policy's name may end in ``@TYPE``, what its pages hold
(``--kv-cache-dtype``): ``retrieval:budget=0.25@int8_per_token_head``. Prefixes are
shared where a name ends in ``+prefixes``, of stock vLLM too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvserve import LLM
from kvserve.evaluation.model import shape_of
from kvserve.models import resolve_model
from kvserve.processor import default_dtype
from kvserve.profiling.fast import profile_arguments
from policies.budgets import PolicySpec

STOCK, WEIGHTS = "none", "weights"


def start_engine(
    name: str, model: str | None, tokens: int, options: Mapping[str, Any]
) -> Any:
    """Start an engine, as :class:`TimedEngine` says, and return the ``LLM``."""
    name, prefixes, _ = name.partition("+prefixes")
    policy, _, own = name.partition(":")
    chosen: dict[str, Any] = {"policy": None}
    if policy in (STOCK, WEIGHTS):
        chosen |= dict(pair.split("=", 1) for pair in own.split(",") if pair)
    else:
        text, _, stored = name.partition("@")
        path = resolve_model(model)
        needed = profile_arguments(text, {}, path, make=True)
        spec = PolicySpec.parse(text, needed)
        shape = shape_of(path).up_to(options["max_model_len"])
        arguments = spec.arguments(tokens, shape)
        chosen = {"policy": spec.name, "policy_args": arguments}
        chosen["kv_cache_dtype"] = stored or "auto"
    chosen["enable_prefix_caching"] = bool(prefixes)
    return LLM(model, **{**chosen, **options})


def random_prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Token ids that no engine has seen, the same for all engines."""
    ids = random.Random(seed)
    return [[ids.randrange(100, 40000) for _ in range(tokens)] for _ in range(count)]


class TimedEngine:
    """An engine, and the times of its steps.

    Args:
        name: see above.
        model: a directory or hub name; ``None`` is the embedded model.
        tokens: length of the requests of which ``budget=`` is a share.
        options: of ``vllm.LLM``.
    """

    def __init__(
        self, name: str, model: str | None, tokens: int, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        self._engine: Any = start_engine(name, model, tokens, options).llm_engine

    def prefill(self, tokens: int, seed: int) -> float:
        """Seconds from a queued prompt to its first token."""
        with self._turn():
            self._add(1, tokens, 1, seed)
            start = time.perf_counter()
            while self._engine.has_unfinished_requests():
                self._engine.step()
            return time.perf_counter() - start

    def decode(self, requests: int, tokens: int, steps: int, seed: int) -> float:
        """Median seconds of a step in which all of some requests get a token."""
        with self._turn():
            self._add(requests, tokens, steps, seed)
            times = []
            while self._engine.has_unfinished_requests():
                start = time.perf_counter()
                outputs = self._engine.step()
                # Steps that still read a prompt return fewer outputs.
                if len(outputs) == requests and not any(o.finished for o in outputs):
                    times.append(time.perf_counter() - start)
            return statistics.median(times[2:])

    def _add(self, count: int, prompt: int, output: int, seed: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        for number, ids in enumerate(random_prompts(count, prompt, seed)):
            request = {"prompt_token_ids": ids}
            self._engine.add_request(f"{seed}-{number}", request, params)

    def _turn(self) -> Any:
        return _no_attention() if self.name == WEIGHTS else nullcontext()


@contextmanager
def _no_attention() -> Iterator[None]:
    """Let stock vLLM's attention leave its output as it is."""
    forward = CPUAttentionBackendImpl.forward

    def nothing(*arguments: Any, **named: Any) -> Any:
        return named["output"] if "output" in named else arguments[7]

    CPUAttentionBackendImpl.forward = nothing
    try:
        yield
    finally:
        CPUAttentionBackendImpl.forward = forward


def add_engine_arguments(
    parser: argparse.ArgumentParser, engines: Sequence[str]
) -> None:
    """Add what all benchmarks of engines take."""
    parser.add_argument("--model", default=None)
    parser.add_argument("--engines", nargs="+", default=list(engines), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--block-size", type=int, help="of kvserve's pages, in tokens")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def start_engines(
    args: argparse.Namespace,
    requests: int,
    tokens: int,
    longest: int,
    kv_memory: int = 1 << 30,
) -> list[TimedEngine]:
    """Start an engine for each name.

    Args:
        requests: that run at once.
        tokens: of a decode request.
        longest: request of all, in tokens.
    """
    options = {
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": requests,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": kv_memory,
        "enforce_eager": args.eager,
    }
    started = []
    for name in args.engines:
        own = {}
        if args.block_size and name not in (STOCK, WEIGHTS):
            own = {"block_size": args.block_size}
        started.append(TimedEngine(name, args.model, tokens, options | own))
    return started
