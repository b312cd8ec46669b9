# SPDX-License-Identifier: Apache-2.0
"""Gates of KV heads, on a tiny random Llama, against masks written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvserve.errors import UserError
from kvserve.plan.page_plan import PagePlan
from kvserve.profiling import gates
from kvserve.profiling.gates import (
    GatedAttention,
    GateSettings,
    gates_so_far,
    train_gates,
    window_mask,
)
from kvserve.profiling.recital import build_recital
from kvserve.texts.families import PROFILING
from kvserve.texts.haystack import load_book
from policies.base import HeadBudget
from tests.reference.visibility import visible_positions
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.tiny_llama import KV_HEADS, LAYERS, tiny_llama

TOKENS = 300
TEXT = load_book(PROFILING.book)


@torch.no_grad()
def logits_with(model: Any, values: Tensor | None, token_ids: Tensor) -> Tensor:
    attention = GatedAttention()
    attention.attach(model)
    attention.gates = values
    logits: Tensor = model(token_ids, use_cache=False).logits
    return logits


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def test_the_window_is_what_the_engine_shows_a_bounded_head() -> None:
    budget = HeadBudget(sinks=32, recent=128)
    plan = PagePlan.from_budgets(((budget,),), page_size=32)
    mask = window_mask(TOKENS)
    for query in range(TOKENS):
        seen = mask[query].nonzero().flatten().tolist()
        assert seen == visible_positions(plan, 0, 0, query)


def test_open_gates_are_the_full_model(token_ids: Tensor) -> None:
    model = tiny_llama(50)
    with torch.no_grad():
        expected = model(token_ids).logits
    for values in (None, torch.ones(LAYERS, KV_HEADS)):
        torch.testing.assert_close(
            logits_with(model, values, token_ids), expected, rtol=1e-4, atol=1e-4
        )


def test_closed_gates_are_a_model_of_windows(token_ids: Tensor) -> None:
    model = tiny_llama(50)
    model.set_attn_implementation("eager")
    hidden = torch.zeros(TOKENS, TOKENS).masked_fill(~window_mask(TOKENS), -1e9)
    with torch.no_grad():
        expected = model(token_ids, attention_mask=hidden[None, None]).logits
    closed = torch.zeros(LAYERS, KV_HEADS)
    actual = logits_with(model, closed, token_ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_gate_moves_its_own_head_alone(token_ids: Tensor) -> None:
    model = tiny_llama(50)
    last = model.model.layers[-1].self_attn
    # The output of KV head 1 (query heads 3 to 5) of the last layer goes nowhere.
    with torch.no_grad():
        last.o_proj.weight[:, 3 * 8 :] = 0
    values = torch.ones(LAYERS, KV_HEADS)
    full = logits_with(model, values, token_ids)
    values[-1, 1] = 0
    torch.testing.assert_close(logits_with(model, values, token_ids), full)
    values[-1, 0] = 0
    assert not torch.allclose(logits_with(model, values, token_ids), full)


def settings(steps: int, penalty: float = 0.2) -> GateSettings:
    return GateSettings(steps, penalty, max_length=1000, seed=0)


def train(steps: int, store: Path, model: Any = None) -> Tensor:
    model = model or tiny_llama(257)
    return train_gates(model, byte_tokenizer(), settings(steps), TEXT, store, False)


@pytest.fixture(autouse=True)
def two_needles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is a token here: ten sentences would be the whole prompt."""
    monkeypatch.setattr(gates, "_NEEDLES", (1, 2))


def test_gates_of_heads_without_effect_close_first(tmp_path: Path) -> None:
    model = tiny_llama(257)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 3 * 8 :] = 0
    found = train(12, tmp_path / "gates.pt", model)
    assert found[:, 1].max() < found[:, 0].max()


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(8, tmp_path / "a.pt")
    taken = 0
    learn = gates._learn

    def interrupted(*arguments: Any) -> float:
        nonlocal taken
        if taken == 6:
            raise KeyboardInterrupt
        taken += 1
        return learn(*arguments)

    monkeypatch.setattr(gates, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(8, tmp_path / "b.pt")
    state = torch.load(tmp_path / "b.pt")
    found = gates_so_far(tmp_path / "b.pt", 8)
    assert found is not None
    torch.testing.assert_close(found, state["total"] / 6)
    assert gates_so_far(tmp_path / "b.pt", 14) is None
    assert gates_so_far(tmp_path / "none.pt", 8) is None
    taken = -100
    torch.testing.assert_close(train(8, tmp_path / "b.pt"), expected)
    assert taken == -100 + 2, "it goes on after the sixth step"


@pytest.mark.parametrize("count", [1, 4])
def test_a_recital_hides_each_needle_and_marks_its_answer(count: int) -> None:
    tokenizer = byte_tokenizer()
    recital = build_recital(tokenizer, PROFILING, 3000, count, "seed", TEXT)
    assert 2900 <= len(recital.token_ids) <= 3000
    text = tokenizer.decode(recital.token_ids)
    prompt, reply = text.split("\nAnswer: ")
    sentences = reply.strip().split("\n")
    assert len(sentences) == count
    assert all(sentence in prompt for sentence in sentences)
    marked = tokenizer.decode([recital.token_ids[index] for index in recital.answers])
    rest = marked
    for sentence in sentences:
        length = next(n for n in range(len(rest), 0, -1) if rest[:n] in sentence)
        rest = rest[length:]
    assert rest == ""


def test_a_recital_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="4 needles do not fit in 100 tokens"):
        build_recital(byte_tokenizer(), PROFILING, 100, 4, "seed", TEXT)
