# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: what `retrieval` keeps is what the model needs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from kvserve.processor import default_dtype
from kvserve.texts.families import MAGIC_NUMBERS
from kvserve.texts.needles import build_prompt, score
from tests.engine.conftest import Model
from tests.engine.harness import MIB, EngineSlot

pytestmark = pytest.mark.engine

_OUTPUT_TOKENS = 10


def _accuracy(
    engines: EngineSlot,
    model: Model,
    policy: str,
    length: int,
    needles: int,
    **policy_args: Any,
) -> tuple[float, int]:
    """Mean needle score, and pages that a request of this length holds."""
    engine = engines.start(
        model.path,
        policy,
        policy_args,
        dtype=default_dtype(),
        max_model_len=4096 + 64,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1024 * MIB,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    prompts = [
        build_prompt(tokenizer, MAGIC_NUMBERS, length, (2 * n + 1) / (2 * needles), n)
        for n in range(needles)
    ]
    replies = engine.generate([prompt.token_ids for prompt in prompts], _OUTPUT_TOKENS)
    scores = [
        score(prompt.answer, tokenizer.decode(reply.tokens))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    (group,) = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    return sum(scores) / needles, group.kv_cache_spec.plan.pages(length)


def _compare(
    engines: EngineSlot, model: Model, length: int, needles: int
) -> dict[str, float]:
    """Scores of `full`, of `retrieval` as it ships, and of windows of its memory."""
    full, _ = _accuracy(engines, model, "full", length, needles)
    kept, pages = _accuracy(engines, model, "retrieval", length, needles)
    lanes = model.shape.num_layers * model.shape.num_kv_heads
    windows = {"sinks": 32, "recent": max(32, round(pages / lanes - 1) * 32)}
    window, held = _accuracy(engines, model, "sink-recent", length, needles, **windows)
    assert abs(held - pages) < lanes, "not the same memory"
    return {"full": full, "retrieval": kept, "sink-recent": window}


def test_retrieval_finds_needles_that_windows_of_the_same_memory_miss(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    scores = _compare(engines, models["smollm2"], length=2048, needles=4)
    assert scores["full"] == 1
    assert scores["retrieval"] >= scores["full"] - 0.02
    assert scores["sink-recent"] <= scores["retrieval"] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2048, 3072, 4000])
def test_retrieval_is_within_2_points_of_the_full_cache(
    engines: EngineSlot, models: dict[str, Model], length: int
) -> None:
    scores = _compare(engines, models["smollm2"], length, needles=16)
    assert scores["retrieval"] >= scores["full"] - 0.02
    if length >= 2048:
        assert scores["sink-recent"] <= scores["retrieval"] - 0.3
