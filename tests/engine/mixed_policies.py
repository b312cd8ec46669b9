# SPDX-License-Identifier: Apache-2.0
"""Requests of many policies for one engine."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from tests.engine.conftest import Model
from tests.engine.harness import PAGE, Engine, EngineSlot

LENGTHS = [1, 31, 64, 97, 200, 333, 480, 610, 777, 900]
STEPS = 2 * PAGE + 8
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "sink-recent:sinks=32,recent=64": ("sink-recent", {"sinks": 32, "recent": 64}),
    "streaming-llm:recent=160": ("sink-recent", {"recent": 160}),
    "retrieval:full_ratio=0.5,recent=64": (
        "retrieval",
        {"full_ratio": 0.5, "recent": 64},
    ),
}
SELECTING: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv:capacity=64,window=16": ("snapkv", {"capacity": 64, "window": 16}),
    "h2o:heavy=64,recent=64": ("h2o", {"heavy": 64, "recent": 64}),
}
SERVER: tuple[str, dict[str, Any]] = "retrieval", {"full_ratio": 0.34, "recent": 96}
"""What requests get that name nothing."""
KINDS: dict[str | None, tuple[str, dict[str, Any]]]
KINDS = {None: SERVER, **NAMED, **SELECTING}


def start(
    engines: EngineSlot, model: Model, chunk: int = 512, **options: Any
) -> Engine:
    policy, arguments = SERVER
    return engines.start(
        model.path,
        policy,
        model.policy_args(policy, **arguments),
        allow_request_policies=True,
        max_num_batched_tokens=chunk,
        **options,
    )


def sampling(text: str | None, **values: Any) -> dict[str, Any]:
    return {**values, **({"extra_args": {"kv_policy": text}} if text else {})}


def mixture(
    seed: int, texts: Iterable[str | None] = KINDS
) -> list[tuple[int, str | None]]:
    """Every prompt under every policy, shuffled."""
    pairs = [(place, text) for place in range(len(LENGTHS)) for text in texts]
    random.Random(seed).shuffle(pairs)
    return pairs
