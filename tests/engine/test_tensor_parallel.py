# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks against one: the same tokens, out of one page count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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


@dataclass
class Served:
    """What came out, and what it took.

    Attributes:
        tokens: of each reply.
        best: log probabilities of the likeliest tokens, for each reply and token.
        held: pages held after every step.
        entries: what each head retained after some of them.
        receipts: tokens, entries seen and entries retained, by prompt.
    """

    tokens: list[list[int]] = field(default_factory=list)
    best: list[list[dict[int, float]]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    entries: list[list[list[int]]] = field(default_factory=list)
    receipts: set[tuple[int, ...]] = field(default_factory=set)


def _serve(engines: EngineSlot, model: Model, policy: str, ranks: int) -> Served:
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
    served, core = Served(), engine._core
    for step in range(10_000):
        if not engine.is_busy:
            break
        engine.step()
        served.held.append(free - engine.pool.get_num_free_blocks())
        if step in (2, 20, 40):
            served.entries.append(core.kvserve_report()["cache"]["entries_retained"])
        if step == 25:
            engine.preempt_all()
    replies = [engine.replies.pop(name) for name in names]
    assert any(reply.preemptions for reply in replies)
    assert engine.pool.get_num_free_blocks() == free
    served.tokens = [reply.tokens for reply in replies]
    served.best = [reply.best for reply in replies]
    served.receipts = {
        (one["tokens_seen"], one["entries_seen"], one["entries_retained"])
        for one in core.kvserve_receipts()[: len(names)]
    }
    return served


def _slow(policies: Iterable[str], fast: tuple[str, ...] = ()) -> list[Any]:
    """Mark all but a few: starting two ranks takes most of a minute."""
    return [
        p if p in fast else pytest.param(p, marks=pytest.mark.slow) for p in policies
    ]


@pytest.mark.parametrize("policy", _slow(POLICIES, fast=("h2o",)))
def test_two_ranks_say_token_by_token_what_one_rank_says(
    engines: EngineSlot, shared: dict[str, Model], policy: str
) -> None:
    one = _serve(engines, shared["gqa"], policy, ranks=1)
    two = _serve(engines, shared["gqa"], policy, ranks=2)
    assert two.tokens == one.tokens
    assert [len(tokens) for tokens in one.tokens] == [STEPS] * len(LENGTHS)
    for reply, should in zip(two.best, one.best, strict=True):
        for best, best_should in zip(reply, should, strict=True):
            assert best == pytest.approx(best_should, abs=1e-3)
    assert two.entries == one.entries
    assert two.receipts == one.receipts
    _assert_pages_are_shared_out(one.held, two.held)


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
    one = _serve(engines, shared["mqa"], policy, ranks=1)
    two = _serve(engines, shared["mqa"], policy, ranks=2)
    assert two.tokens == one.tokens
    assert two.held == one.held


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["retrieval", "sharded"])
def test_two_ranks_share_the_pages_of_a_prefix(
    engines: EngineSlot, shared: dict[str, Model], policy: str
) -> None:
    model = shared["gqa"]
    (stem,) = random_prompts([300], model.vocab, seed=5)
    prompts = [stem + own for own in random_prompts([9, 40, 90], model.vocab, seed=6)]
    options = {} if policy == "sharded" else {"block_size": 32}
    arguments = model.policy_args(policy, **POLICIES[policy])
    plain = engines.start(model.path, policy, arguments, **options)
    expected = [plain.generate([prompt], STEPS)[0] for prompt in prompts]
    two = engines.start(
        model.path,
        policy,
        arguments,
        tensor_parallel_size=2,
        max_num_batched_tokens=200,
        enable_prefix_caching=True,
        **options,
    )
    for _ in range(2):
        replies = two.generate(prompts, STEPS)
        assert [r.tokens for r in replies] == [r.tokens for r in expected]
    assert all(reply.cached > 256 for reply in replies)
    assert two.pool.get_num_free_blocks() == two.pages_for_requests
