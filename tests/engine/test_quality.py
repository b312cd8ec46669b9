# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: what `retrieval` keeps is what the model needs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from kvserve.evaluation.needles import EVALUATION, build_prompt, score
from tests.engine.conftest import Model
from tests.engine.harness import MIB, EngineSlot

pytestmark = pytest.mark.engine

_OUTPUT_TOKENS = 24


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
        dtype="bfloat16",
        max_model_len=4096 + 64,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1024 * MIB,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    prompts = [
        build_prompt(tokenizer, EVALUATION, length, (2 * n + 1) / (2 * needles), n)
        for n in range(needles)
    ]
    replies = engine.generate([prompt.token_ids for prompt in prompts], _OUTPUT_TOKENS)
    scores = [
        score(prompt.answer, tokenizer.decode(reply.tokens))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    (group,) = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    return sum(scores) / needles, group.kv_cache_spec.plan.pages(length)


def _check(engines: EngineSlot, model: Model, length: int, needles: int) -> None:
    """`retrieval` within 2 points of `full`, windows alone far below."""
    full, all_pages = _accuracy(engines, model, "full", length, needles)
    kept, pages = _accuracy(engines, model, "retrieval", length, needles)
    # The same memory, spent on windows alone.
    lanes = model.shape.num_layers * model.shape.num_kv_heads
    recent = max(32, round(pages / lanes - 1) * 32)
    window, window_pages = _accuracy(
        engines, model, "sink-recent", length, needles, sinks=32, recent=recent
    )
    assert pages < all_pages
    assert abs(window_pages - pages) < lanes
    assert full >= 0.8
    assert kept >= full - 0.02
    assert window <= full - 0.3


def test_retrieval_finds_needles_like_the_full_cache(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    _check(engines, models["smollm2"], 1400, 8)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2048, 3072, 4096])
def test_retrieval_finds_needles_like_the_full_cache_at_every_length(
    engines: EngineSlot, models: dict[str, Model], length: int
) -> None:
    _check(engines, models["smollm2"], length, 16)
