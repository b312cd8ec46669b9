# SPDX-License-Identifier: Apache-2.0
"""What repeating a text looks at, against attention matrices of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvserve.errors import UserError
from kvserve.profiling.repetition import (
    Repetition,
    RepetitionProbe,
    build_repetition,
    read_and_repeat,
)
from kvserve.texts.families import PROFILING
from kvserve.texts.haystack import load_book
from tests.reference.random_models import write_random_model
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.tiny_llama import KV_HEADS, LAYERS, tiny_llama


def test_scores_are_the_most_that_the_repetition_pays() -> None:
    tokens = torch.randint(257, (1, 700), generator=torch.Generator().manual_seed(0))
    reply, model = 320, tiny_llama(vocab_size=257)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = model(tokens, output_attentions=True).attentions
    probe = RepetitionProbe()
    probe.attach(model)
    found = read_and_repeat(
        model, probe, Repetition(tokens[0].tolist(), (0, reply), reply)
    )
    assert len(found) == LAYERS
    for one, weights in zip(found, maps, strict=True):
        paid = weights[0, :, reply:, :reply].amax(1)
        expected = paid.view(KV_HEADS, -1, reply).amax(1)
        torch.testing.assert_close(one.scores, expected)


def test_queries_and_keys_are_those_before_rotation() -> None:
    tokens, model = [*range(200)], tiny_llama(vocab_size=257)
    probe = RepetitionProbe()
    probe.attach(model)
    (first, *_) = read_and_repeat(model, probe, Repetition(tokens, (0, 100), 100))
    block = model.model.layers[0]
    hidden = block.input_layernorm(model.model.embed_tokens(torch.tensor(tokens)))
    for found, module in (
        (first.queries, block.self_attn.q_proj),
        (first.keys, block.self_attn.k_proj),
        (first.values, block.self_attn.v_proj),
    ):
        expected = module(hidden)[:100].view(100, len(found), -1).transpose(0, 1)
        torch.testing.assert_close(found, expected)


def test_the_reply_is_the_text_of_the_prompt() -> None:
    tokenizer, book = byte_tokenizer(), load_book(PROFILING.book)
    one = build_repetition(tokenizer, PROFILING, 900, 4, "seed", book)
    assert 880 <= one.reply <= 900
    first, last = one.text
    assert one.token_ids[first:last] == one.token_ids[one.reply :]
    assert last < one.reply
    again = build_repetition(tokenizer, PROFILING, 900, 4, "seed", book)
    assert one == again
    with pytest.raises(UserError, match="4 facts do not fit in 50 tokens"):
        build_repetition(tokenizer, PROFILING, 50, 4, "seed", book)


def test_keys_that_have_no_projection_of_their_own_are_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1}
    write_random_model("phi3", {**shape, "intermediate_size": 64}, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    probe = RepetitionProbe()
    probe.attach(model)
    with pytest.raises(
        UserError, match=r"^MODEL: its layers project queries, .*keydiff$"
    ):
        read_and_repeat(model, probe, Repetition([1, 2, 3, 4], (0, 2), 2))
