# SPDX-License-Identifier: Apache-2.0
"""The fast profile: what it measures, where it is kept, who makes it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from benchmarks.long_replies import distinct
from benchmarks.profiles import RepeatProbe
from kvserve.errors import UserError
from kvserve.profiling import fast, retrieval
from kvserve.profiling.attention_hook import install_attention
from kvserve.profiling.fast import (
    cached_profile,
    measure_windows,
    profile_arguments,
    profile_fast,
)
from kvserve.profiling.influence import InfluenceProbe
from policies.base import Local, ModelShape
from policies.head_scores import load_head_scores
from tests.reference.random_models import write_random_model
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS, tiny_llama


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few facts: a letter is a token of the tiny model."""
    monkeypatch.setattr(fast, "_FACTS", 2)


def test_the_retrieval_policy_reads_the_profile(model_dir: str, tmp_path: Path) -> None:
    path = profile_fast(model_dir, tmp_path / "out", progress=False)
    shape = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8)
    scores = torch.tensor(load_head_scores(str(path), shape))
    assert (scores > 0).all()
    model = tiny_llama(vocab_size=257)
    again = measure_windows(model, byte_tokenizer(), progress=False)
    torch.testing.assert_close(scores, again, rtol=1e-3, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["retrieval.json"]


class Windowed:
    """Attention of which one KV head sees a sink block and a window of blocks."""

    def __init__(self, layer: int, head: int) -> None:
        self.which = layer, head

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **_: Any,
    ) -> tuple[Tensor, None]:
        tokens, group = query.shape[2], query.shape[1] // key.shape[1]
        own = torch.arange(tokens)
        causal = own[:, None] >= own
        block = own // fast.BLOCK
        near = block > block[:, None] - fast._WINDOW_BLOCKS
        visible = causal.expand(query.shape[1], -1, -1).clone()
        if module.layer_idx == self.which[0]:
            head = self.which[1]
            visible[head * group : (head + 1) * group] &= near | (block == 0)
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[None]
        )
        return output.transpose(1, 2), None


def test_the_head_whose_window_moves_the_answers_most_is_ranked_first() -> None:
    model, tokenizer = tiny_llama(vocab_size=257), byte_tokenizer()
    text = fast.load_book(fast.PROFILING.book)
    found = measure_windows(model, tokenizer, progress=False)
    recitals = [fast._recital(tokenizer, item, text) for item in range(fast._PROMPTS)]
    model.eval()
    model.gradient_checkpointing_disable()

    def answers(layer: int, head: int) -> list[Tensor]:
        install_attention(
            model, f"windowed-{layer}-{head}", Windowed(layer, head), sdpa_mask
        )
        with torch.inference_mode():
            return [
                model(torch.tensor([r.token_ids]), use_cache=False)
                .logits[0, torch.tensor(r.answers) - 1]
                .log_softmax(-1)
                for r in recitals
            ]

    full = answers(-1, 0)
    moved = torch.zeros(LAYERS, KV_HEADS)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            for before, after in zip(full, answers(layer, head), strict=True):
                change = (before.exp() * (before - after)).sum(-1).mean()
                moved[layer, head] += change / len(full)
    assert moved.argmax() == found.argmax()


def write_model(model_type: str, folder: Path, **values: Any) -> str:
    """Write a model of three layers that reads bytes; the middle one sees it all."""
    shape = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    write_random_model(model_type, {**shape, **values}, folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


CHUNKS = {
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "attention_chunk_size": 128,
    "num_local_experts": 2,
    "intermediate_size_mlp": 64,
}


@pytest.mark.parametrize(
    ("model_type", "values"), [("gemma3_text", {}), ("llama4_text", CHUNKS)]
)
def test_layers_with_windows_or_chunks_of_their_own_are_passed_over(
    tmp_path: Path, model_type: str, values: dict[str, Any]
) -> None:
    folder = write_model(model_type, tmp_path / model_type, **values)
    path = profile_fast(folder, tmp_path / "out", progress=False)
    local = Local(128, is_chunk=bool(values)), None
    shape = ModelShape(model_type, 3, 6, 2, 8, local=(*local, local[0]))
    (scores,) = load_head_scores(str(path), shape.open)
    assert all(score > 0 for score in scores)
    rows = json.loads(path.read_text())["kv_head_scores"]
    assert rows == [[0.0, 0.0], scores, [0.0, 0.0]]
    # What is measured is the model itself.
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(257, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        InfluenceProbe("joint").attach(model)
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "values", "said"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0}, "caps its scores"),
        ("gpt_oss", {"num_local_experts": 2}, "has attention sinks"),
        ("bloom", {}, "computes its attention by itself"),
    ],
)
def test_scores_that_are_not_only_products_are_refused_in_one_line(
    tmp_path: Path, model_type: str, values: dict[str, Any], said: str
) -> None:
    folder = write_model(model_type, tmp_path / model_type, **values)
    with pytest.raises(UserError, match=f"^MODEL: it {said}, .* sink-recent$"):
        profile_fast(folder, tmp_path / "out", progress=False)


def test_a_profile_is_kept_under_the_models_identity(
    model_dir: str, tmp_path: Path
) -> None:
    first = cached_profile(model_dir)
    assert first == cached_profile(model_dir)
    other = tmp_path / "tiny"
    shutil.copytree(model_dir, other)  # keeps times: the same model elsewhere
    assert cached_profile(str(other)) == first
    os.utime(other / "model.safetensors", (1, 1))
    assert cached_profile(str(other)) != first
    shutil.copytree(model_dir, other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 2.0}))
    assert cached_profile(str(other)) != first
    with pytest.raises(UserError, match="cannot be loaded"):
        cached_profile(str(tmp_path / "none"))


def test_a_model_is_measured_once_and_only_where_it_must_be(
    model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def measure(model: str, path: Path) -> None:
        made.append(model)
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    monkeypatch.setattr(fast, "_measure_apart", measure)
    for policy, arguments, model in (
        ("h2o", {}, model_dir),
        ("retrieval:profile=mine.json", {}, model_dir),
        ("retrieval", {"profile": "mine.json"}, model_dir),
        ("retrieval", {}, "some/SmolLM2-135M-Instruct"),
    ):
        assert profile_arguments(policy, arguments, model, make=True) == arguments
    assert profile_arguments("retrieval", {}, model_dir, make=False) == {}
    assert not made
    expected = {"full_ratio": "0.5", "profile": str(cached_profile(model_dir))}
    for make in (True, True, False):
        given = {"full_ratio": "0.5"}
        assert profile_arguments("retrieval", given, model_dir, make=make) == expected
    assert made == [model_dir]


def test_a_model_that_cannot_be_measured_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--policy retrieval: .* sink-recent:budget"):
        fast._measure_apart(str(tmp_path / "none"), tmp_path / "out" / "retrieval.json")


def test_the_command_makes_a_fast_profile(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    retrieval.add_arguments(parser)
    args = parser.parse_args(["--fast", model_dir, "--out", str(tmp_path)])
    assert retrieval.run(args) == 0
    assert str(tmp_path / "retrieval.json") in capsys.readouterr().out


def test_heads_that_repeat_are_told_by_where_they_look() -> None:
    probe = RepeatProbe(torch.tensor([3000, 3999]))
    keys = torch.zeros(1, 1, 4000, 4000)
    keys[0, 0] = torch.eye(4000)
    query = torch.zeros(1, 2, 4000, 4000)
    for place in (3000, 3999):
        query[0, 0, place, place - 1000] = 50.0  # an earlier copy of the same token
        query[0, 1, place, place - 1999] = 50.0  # what came behind an earlier copy
    probe.attend(0, query, keys, torch.zeros(1, 1, 4000, 1), 1.0)
    torch.testing.assert_close(probe.echo[0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(probe.induction[0], torch.tensor([0.0, 1.0]))


def test_distinct_grams_fall_when_text_repeats() -> None:
    assert distinct(range(20)) == 1
    assert distinct([1, 2, 3, 4] * 25) == 4 / 97
