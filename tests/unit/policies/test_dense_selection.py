# SPDX-License-Identifier: Apache-2.0
"""What dense policies select: published fixtures, and references written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kvserve.errors import UserError
from policies.base import Lane, ModelShape, Prompt
from policies.h2o import H2O
from policies.heterogeneous import Heterogeneous
from policies.registry import create_policy
from policies.scoring import top_positions
from policies.snapkv import SnapKV
from tests.reference.dense_policies import (
    H2OReference,
    Reference,
    SnapKVReference,
    TaskKVReference,
    softmax_rows,
)

GQA = ModelShape("gqa", num_layers=4, num_query_heads=8, num_kv_heads=4, head_size=8)
LLAMA_2 = ModelShape("llama-2", 32, 32, 32, 128)
MISTRAL = ModelShape("mistral", 32, 32, 8, 128)


def make_prompt(tokens: int, window: int, seed: int) -> tuple[Prompt, Tensor]:
    """A random layer of the GQA model, and its whole attention matrix."""
    random = torch.Generator().manual_seed(seed)
    query = 1.5 * torch.randn(8, tokens, 8, generator=random)
    key = 1.5 * torch.randn(4, tokens, 8, generator=random)
    value = torch.randn(4, tokens, 8, generator=random)
    attention = softmax_rows(query, key, 0.35)
    mass = attention.view(4, 2, tokens, tokens).sum(dim=(1, 2))
    last = query[:, tokens - window :]
    return Prompt(key, value, last, 0.35, mass), attention


REFERENCES: list[tuple[Any, Reference]] = [
    (SnapKV(capacity=64, window=8), SnapKVReference(64, 8)),
    (SnapKV(capacity=90, window=32, kernel=7), SnapKVReference(90, 32, 7)),
    (H2O(heavy=40, recent=50), H2OReference(40, 50)),
    (H2O(heavy=40, recent=50, norm="count"), H2OReference(40, 50, count=True)),
    (
        Heterogeneous(budget=0.5, beta=0.5, m=1, sinks=4, recent=32),
        TaskKVReference(4, "0.5", "0.5", 1, 4, 32),
    ),
    (
        Heterogeneous(budget=0.3, beta=0.25, m=0, sinks=4, recent=40, top=20),
        TaskKVReference(4, "0.3", "0.25", 0, 4, 40, top=20),
    ),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("policy", "reference"), REFERENCES)
def test_a_selection_equals_the_reference(
    policy: Any, reference: Reference, seed: int
) -> None:
    prompt, attention = make_prompt(257, policy.observation_window, seed)
    for layer, lanes in enumerate(policy.lanes(GQA, 257)):
        chosen = policy.select(GQA, layer, prompt, lanes)
        found = {
            head: set(positions.tolist())
            for head, positions in zip(
                chosen.head_of_lane, chosen.positions, strict=True
            )
        }
        expected = reference.keep(layer, attention, prompt.values)
        assert found == dict(enumerate(expected))


def test_of_equal_scores_the_later_position_is_kept() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert top_positions(scores, 3).tolist() == [1, 3, 4]
    assert top_positions(scores, 1).tolist() == [3]
    assert top_positions(scores, 0).tolist() == []


def test_h2o_keeps_what_the_worked_example_keeps() -> None:
    rows = [[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.3, 0], [0.4, 0.3, 0.1, 0.2]]
    mass = torch.tensor(rows).sum(dim=0)
    torch.testing.assert_close(mass, torch.tensor([2.5, 0.9, 0.4, 0.2]))
    reference = H2OReference(1, 1)
    (kept,) = reference.keep(0, torch.tensor([rows]), torch.zeros(1, 4, 2))
    assert kept == {0, 3}
    assert reference.evict({0: 3.0, 3: 0.5, 4: 0.2}, 4, 4) == 3


def test_h2o_sizes_are_shares_of_the_prompt_or_numbers() -> None:
    (lane, *_), *_ = H2O().lanes(GQA, 4000)
    assert lane == Lane(800, "heavy", 400, 800)
    (lane, *_), *_ = H2O(heavy=100, recent=60, decode=False).lanes(GQA, 4000)
    assert lane == Lane(160)
    (lane, *_), *_ = H2O(reply=64).lanes(GQA, 50)
    assert lane == Lane(50, "heavy", 32, 64)


def test_a_reply_may_fill_what_shares_of_a_short_prompt_do_not() -> None:
    (lane, *_), *_ = H2O().lanes(GQA, 25)
    assert lane == Lane(25, "heavy", 128, 256)
    (lane, *_), *_ = H2O(heavy_ratio=0.05, recent_ratio=0.15).lanes(GQA, 1000)
    assert lane == Lane(200, "heavy", 192, 256)
    (lane, *_), *_ = H2O().lanes(GQA, 4000)
    assert lane == Lane(800, "heavy", 400, 800)
    (lane, *_), *_ = H2O(heavy=32, recent=32).lanes(GQA, 25)
    assert lane == Lane(25, "heavy", 32, 64)


def test_far_heads_of_each_layer_are_those_of_the_paper() -> None:
    policy = Heterogeneous(beta=0.25, m=4)
    counts = [policy.heterogeneous_heads(layer, LLAMA_2) for layer in range(32)]
    assert counts == [8] + [7] * 7 + [6] * 8 + [5] * 8 + [4] * 8
    policy = Heterogeneous(beta=0.3, m=1)
    counts = [policy.heterogeneous_heads(layer, MISTRAL) for layer in range(32)]
    assert counts == [2] * 9 + [1] * 23


def test_a_budget_is_spent_to_within_a_head() -> None:
    (first, *_) = Heterogeneous(beta=0.25, m=4).lanes(LLAMA_2, 8192)
    assert sum(lane.keep == 8192 for lane in first) == 9
    assert {lane.keep for lane in first[9:]} == {16 + 1081 + 256}
    assert 0 <= 104_857 - sum(lane.keep for lane in first) <= 22


def test_the_centre_head_is_the_nearest_and_the_lower_of_two() -> None:
    vectors = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [3, 3]])
    policy = Heterogeneous(top=1)
    distance = policy._distance(vectors)
    expected = torch.tensor([1.096, 1.028, 1.028, 3.147])
    torch.testing.assert_close(distance, expected, rtol=1e-3, atol=0)
    # One token that holds all attention and reads the vectors themselves.
    observed = torch.ones(4, 1)
    full, others = policy._classes(observed, vectors[:, None], 1, True)
    assert (full, others) == ([3, 1], [0, 2])


@pytest.mark.parametrize("budget", [0.05, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("tokens", [300, 700, 4000])
def test_no_budget_is_overspent(budget: float, tokens: int) -> None:
    policy = Heterogeneous(budget=budget, beta=0.5, m=2)
    for lanes in policy.lanes(GQA, tokens):
        least = 4 * (policy.window + 1)
        assert sum(lane.keep for lane in lanes) <= max(budget * 4 * tokens, least)


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        ("snapkv", {"kernel": 4}, "kernel=4: must be odd"),
        ("snapkv", {"pooling": "sum"}, "pooling=sum: must be one of avg, max"),
        ("snapkv", {"capacity": 64, "window": 64}, "window=64: must be less than"),
        ("h2o", {"norm": "max"}, "norm=max: must be one of none, count"),
        ("h2o", {"recent": 8}, "recent=8: must be at least 32"),
        ("heterogeneous", {"distance": "l1"}, "distance=l1: must be one of l2"),
        ("heterogeneous", {"window": 300}, "window=300: must be at most recent=256"),
    ],
)
def test_what_a_policy_cannot_do_is_refused(
    policy: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create_policy(policy, arguments)


def test_a_budget_that_no_request_could_meet_is_refused() -> None:
    served = dataclasses.replace(GQA, max_tokens=2048)
    message = "budget=0.01: leaves a head fewer than 33 of 2048 tokens.*at least 0.0162"
    with pytest.raises(UserError, match=message):
        Heterogeneous(budget=0.01).lanes(served, 2048)
    (lanes, *_) = Heterogeneous(budget=0.0162, beta=0.0).lanes(served, 2048)
    assert {lane.keep for lane in lanes} == {33}
