# SPDX-License-Identifier: Apache-2.0
"""What windows would cost, against masks written out and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvserve.profiling.influence import (
    BLOCK,
    InfluenceProbe,
    Measure,
    add_diagonals,
    entry_influence,
    hidden_entries,
    hidden_jointly,
    measure_influence,
)
from kvserve.profiling.recital import Recital
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS, tiny_llama

TOKENS = 4 * BLOCK
BLOCKS = 4


def rows_of(count: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention probabilities, their slopes and the offset of each row."""
    generator = torch.Generator().manual_seed(count)
    weights = torch.randn(count, keys, generator=generator, dtype=torch.double)
    weights = (3 * weights).softmax(-1)
    slopes = torch.randn(count, keys, generator=generator, dtype=torch.double)
    return weights, slopes, (weights * slopes).sum(-1)


def change_without(weights: Tensor, slopes: Tensor, hidden: Tensor) -> Tensor:
    """Mask, renormalise, and see how far a linear loss moves."""
    masked = weights.masked_fill(hidden, 0)
    masked = masked / masked.sum(-1, keepdim=True)
    return ((masked - weights) * slopes).sum(-1)


def test_the_influence_of_an_entry_is_the_papers() -> None:
    weights, slopes = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1.0, 0.0, -1.0]])
    found = entry_influence(weights, slopes, (weights * slopes).sum(-1))
    assert found[0].tolist() == pytest.approx([-0.7, 0.1286, 0.325], abs=1e-4)


def test_the_influence_of_an_entry_is_hiding_it_alone() -> None:
    weights, slopes, offset = rows_of(5, 7)
    found = entry_influence(weights, slopes, offset)
    for key in range(7):
        hidden = torch.arange(7) == key
        expected = change_without(weights, slopes, hidden)
        torch.testing.assert_close(found[:, key], expected)


def test_joint_influence_is_hiding_all_keys_at_once() -> None:
    weights, slopes, offset = rows_of(5, 5 * BLOCK)
    found = hidden_jointly(weights, slopes, offset)
    block = torch.arange(5 * BLOCK) // BLOCK
    # The last block is the query's own: it is never hidden.
    for last in range(4):
        expected = change_without(weights, slopes, (block > 0) & (block <= last))
        torch.testing.assert_close(found[:, last], expected)


def test_influence_of_entries_adds_up_what_is_hidden() -> None:
    weights, slopes, offset = rows_of(5, 4 * BLOCK)
    found = hidden_entries(weights, slopes, offset)
    sizes = entry_influence(weights, slopes, offset).abs().view(5, 4, BLOCK).sum(-1)
    torch.testing.assert_close(found[:, 0], torch.zeros(5, dtype=torch.double))
    torch.testing.assert_close(found[:, 2], sizes[:, 1] + sizes[:, 2])


def test_changes_belong_to_the_window_that_makes_them() -> None:
    changes = torch.zeros(2 * BLOCK, 6)
    changes[0] = torch.tensor([9.0, 1.0, 2.0, 3.0, 9.0, 9.0])  # of query block 4
    changes[BLOCK] = torch.tensor([9.0, 10.0, 20.0, 30.0, 40.0, 9.0])  # of block 5
    curve = torch.zeros(6)
    add_diagonals(curve, changes, first_block=4)
    # Block 4 that does not see blocks 1..b has a window of 4 - b blocks.
    assert curve.tolist() == [0, 3 + 40, 2 + 30, 1 + 20, 10, 0]


def recital() -> Recital:
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, 50, (TOKENS,), generator=generator).tolist()
    return Recital(token_ids, [TOKENS - 20, TOKENS - 9])


def probed(measure: Measure) -> tuple[Any, InfluenceProbe]:
    model, probe = tiny_llama(50), InfluenceProbe(measure)
    probe.attach(model)
    return model, probe


def test_the_probe_changes_neither_logits_nor_gradients() -> None:
    results = []
    for model in (tiny_llama(50), probed("joint")[0]):
        inputs = model.get_input_embeddings()(torch.tensor([recital().token_ids]))
        inputs = inputs.detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        logits[0, -1].log_softmax(-1)[7].backward()
        results.append((logits.detach(), inputs.grad))
    for plain, seen in zip(*results, strict=True):
        torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-4)


def explicit_curves(measure: Measure, seed: int) -> Tensor:
    """Whole attention maps and autograd, window by window, ``[R, H_kv, blocks]``."""
    model = tiny_llama(50)
    model.set_attn_implementation("eager")
    text = recital()
    output = model(torch.tensor([text.token_ids]), output_attentions=True)
    for maps in output.attentions:
        maps.retain_grad()
    log_probs = output.logits[0, [place - 1 for place in text.answers]].log_softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    reply = torch.multinomial(log_probs.exp().detach(), 1, generator=generator)
    (-log_probs.gather(1, reply)).sum().backward()
    position = torch.arange(TOKENS)
    curves = torch.zeros(LAYERS, KV_HEADS, BLOCKS)
    for layer, maps in enumerate(output.attentions):
        for head in range(QUERY_HEADS):
            weights, slopes = maps[0, head].detach(), maps.grad[0, head]
            for window in range(1, BLOCKS):
                block = position // BLOCK
                hidden = (block > 0) & (block <= (block - window)[:, None])
                if measure == "joint":
                    change = change_without(weights, slopes, hidden).sum()
                else:
                    offset = (weights * slopes).sum(-1)
                    sizes = entry_influence(weights, slopes, offset).abs()
                    change = sizes[hidden].sum()
                curves[layer, head * KV_HEADS // QUERY_HEADS, window] += change
    if measure == "joint":
        curves = curves.square() / 2
    return curves / len(text.answers)


@pytest.mark.parametrize("measure", ["joint", "entries"])
def test_curves_equal_those_of_whole_attention_maps(measure: Measure) -> None:
    model, probe = probed(measure)
    found = measure_influence(model, probe, recital(), seed=5)
    expected = explicit_curves(measure, seed=5)
    assert expected[..., 1].min() > 0
    scale = float(expected.max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_a_window_of_everything_costs_nothing() -> None:
    model, probe = probed("joint")
    found = measure_influence(model, probe, recital(), seed=5)
    assert found.shape == (LAYERS, KV_HEADS, BLOCKS)
    assert not found[..., BLOCKS - 1].any()


@pytest.mark.parametrize("window", [BLOCK + 3, TOKENS])
def test_a_layer_with_a_window_of_its_own_attends_as_it_does(window: int) -> None:
    model = tiny_gemma(window)
    tokens = torch.arange(TOKENS)[None] * 7 % 100
    with torch.no_grad():
        expected = model(tokens).logits
    probe = InfluenceProbe("joint")
    probe.attach(model)
    recital = Recital(tokens[0].tolist(), tuple(range(TOKENS - 8, TOKENS)))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    windowed, full = measure_influence(model, probe, recital, seed=0)
    assert windowed.any() == (window == TOKENS)
    assert full.any()


def tiny_gemma(window: int) -> Gemma3ForCausalLM:
    """A layer that sees ``window`` tokens, then one that sees everything."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.4,
    )
    return Gemma3ForCausalLM(config).eval()
