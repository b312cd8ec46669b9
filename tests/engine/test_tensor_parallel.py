# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks against one: the same tokens, out of one page count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.engine.conftest import Model, tiny_model
from tests.engine.harness import EngineSlot, random_prompts
from tests.reference.models import TinyLlama

pytestmark = pytest.mark.engine

SHAPES = {
    # Four KV heads, two to a rank; their budgets differ within and between ranks.
    "gqa": TinyLlama("tiny-gqa-4", 3, 8, 4, head_size=32, hidden_size=128),
    # One KV head, which both ranks hold.
    "mqa": TinyLlama("tiny-mqa", 3, 4, 1, head_size=32, hidden_size=128),
}
LENGTHS = [3, 64, 333, 700]
STEPS = 48
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"recent": 96},
    "retrieval": {"full_ratio": 0.4, "recent": 96},
    "moa": {},
    "sharded": {"local_blocks": 2, "stride": 4},
    "snapkv": {"capacity": 100, "window": 16},
    "h2o": {"heavy": 40, "recent": 48},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    directory = tmp_path_factory.mktemp("ranks")
    return {name: tiny_model(tiny, directory) for name, tiny in SHAPES.items()}


def _serve(
    engines: EngineSlot, model: Model, policy: str, ranks: int
) -> tuple[list[list[int]], list[list[dict[int, float]]], list[int]]:
    """Tokens, their best log probabilities, and pages held at every step."""
    options = {} if policy == "sharded" else {"block_size": 32}
    engine = engines.start(
        model.path,
        policy,
        model.policy_args(policy, **POLICIES[policy]),
        tensor_parallel_size=ranks,
        max_num_batched_tokens=200,
        **options,
    )
    free = engine.pool.get_num_free_blocks()
    prompts = random_prompts(LENGTHS, model.vocab, seed=4)
    names = [engine.add(prompt, STEPS) for prompt in prompts]
    held = []
    for step in range(10_000):
        if not engine.is_busy:
            break
        engine.step()
        held.append(free - engine.pool.get_num_free_blocks())
        if step == 25:
            engine.preempt_all()
    replies = [engine.replies.pop(name) for name in names]
    assert any(reply.preemptions for reply in replies)
    assert engine.pool.get_num_free_blocks() == free
    return [r.tokens for r in replies], [r.best for r in replies], held


def _slow(policies: Iterable[str], fast: tuple[str, ...] = ()) -> list[Any]:
    """Mark all but a few: starting two ranks takes most of a minute."""
    return [
        p if p in fast else pytest.param(p, marks=pytest.mark.slow) for p in policies
    ]


@pytest.mark.parametrize("policy", _slow(POLICIES, fast=("retrieval", "h2o")))
def test_two_ranks_say_token_by_token_what_one_rank_says(
    engines: EngineSlot, shared: dict[str, Model], policy: str
) -> None:
    one, expected, held_by_one = _serve(engines, shared["gqa"], policy, ranks=1)
    two, found, held_by_two = _serve(engines, shared["gqa"], policy, ranks=2)
    assert two == one
    assert [len(tokens) for tokens in one] == [STEPS] * len(LENGTHS)
    for reply, should in zip(found, expected, strict=True):
        for best, best_should in zip(reply, should, strict=True):
            assert best == pytest.approx(best_should, abs=1e-3)
    _assert_pages_are_shared_out(held_by_one, held_by_two)


def _assert_pages_are_shared_out(one: list[int], two: list[int]) -> None:
    """A rank holds at least half of all pages, and never all of them."""
    assert len(one) == len(two)
    for all_pages, largest in zip(one, two, strict=True):
        assert all_pages <= 2 * largest
        assert largest < all_pages or not all_pages


@pytest.mark.parametrize("policy", _slow(["retrieval", "moa"]))
def test_a_head_that_two_ranks_hold_says_the_same(
    engines: EngineSlot, shared: dict[str, Model], policy: str
) -> None:
    one, _, held_by_one = _serve(engines, shared["mqa"], policy, ranks=1)
    two, _, held_by_two = _serve(engines, shared["mqa"], policy, ranks=2)
    assert two == one
    assert held_by_two == held_by_one
