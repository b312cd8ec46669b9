# SPDX-License-Identifier: Apache-2.0
"""Retrieval head detection on a tiny random Llama, against plain attention maps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kvserve.errors import UserError
from kvserve.models import EMBEDDED_MODEL
from kvserve.profiling import gates, retrieval
from kvserve.profiling.copy_score import Instance, TopKeyProbe, run_instance
from kvserve.profiling.retrieval import (
    RetrievalSettings,
    kv_head_scores,
    profile_retrieval,
)
from kvserve.texts.needles import Needle, NeedlePrompt
from policies.base import ModelShape
from policies.head_scores import load_head_scores, top_heads
from tests.unit.profiling.conftest import interrupted
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS, tiny_llama

# A random model finds nothing: keep its instances all the same.
SMALL = RetrievalSettings(
    min_length=500,
    max_length=560,
    lengths=2,
    depths=2,
    needles=1,
    max_decode_tokens=4,
    min_recall=-1.0,
    gate_steps=0,
)


class Letters:
    """A tokenizer that can only decode: token n is letter n."""

    eos_token_id: int | None = None

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def letters_prompt(length: int, answer_span: tuple[int, int], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 8, (length,), generator=generator).tolist()
    needle = Needle("", "", "", Letters().decode(token_ids[slice(*answer_span)]))
    return NeedlePrompt(token_ids, needle, answer_span, answer_span)


def explicit_scores(
    model: LlamaForCausalLM, prompt: NeedlePrompt, steps: int
) -> tuple[Tensor, list[int]]:
    """policies.md 5.1 by the letter: whole attention maps, no cache, ``[R, H_q]``."""
    model.set_attn_implementation("eager")
    first, last = prompt.answer_span
    token_ids = list(prompt.token_ids)
    scores = torch.zeros(LAYERS, QUERY_HEADS)
    for _ in range(steps):
        with torch.inference_mode():
            output = model(torch.tensor([token_ids]), output_attentions=True)
        token = int(output.logits[0, -1].argmax())
        for layer, maps in enumerate(output.attentions):
            for head in range(QUERY_HEADS):
                key = int(maps[0, head, -1].argmax())
                if first <= key < last and prompt.token_ids[key] == token:
                    scores[layer, head] += 1 / (last - first)
        token_ids.append(token)
    return scores, token_ids[len(prompt.token_ids) :]


def dense(instance: Instance) -> Tensor:
    scores = torch.zeros(LAYERS, QUERY_HEADS)
    for (layer, head), value in instance.copied.items():
        scores[layer, head] = value
    return scores


def measure(model: LlamaForCausalLM, prompt: NeedlePrompt, steps: int) -> Instance:
    probe = TopKeyProbe()
    probe.attach(model)
    return run_instance(model, Letters(), probe, prompt, steps)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("span", [(0, 40), (7, 30)])
def test_scores_equal_those_of_explicit_attention_maps(
    seed: int, span: tuple[int, int]
) -> None:
    model = tiny_llama(vocab_size=8, seed=seed)
    prompt = letters_prompt(40, span, seed)
    expected, _ = explicit_scores(model, prompt, steps=12)
    assert expected.sum() > 0, "the case tests nothing"
    torch.testing.assert_close(dense(measure(model, prompt, 12)), expected)


def test_a_newline_or_the_end_token_ends_the_answer() -> None:
    model = tiny_llama(vocab_size=8)
    prompt = letters_prompt(40, (0, 40), 0)
    _, response = explicit_scores(model, prompt, steps=12)
    stop = response[3]
    steps = response.index(stop)
    until_stop = dense(measure(model, prompt, steps)) if steps else torch.zeros(3, 6)

    class Ending(Letters):
        eos_token_id = stop

    class Newline(Letters):
        def decode(self, tokens: list[int]) -> str:
            return "".join("x\n"[token == stop] for token in tokens) + "x"

    probe = TopKeyProbe()
    probe.attach(model)
    for tokenizer in (Ending(), Newline()):
        instance = run_instance(model, tokenizer, probe, prompt, 12)
        torch.testing.assert_close(dense(instance), until_stop)


def test_a_kv_head_takes_the_best_of_its_group() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.0], [0.0, 0.0, 0.3, 0.9]])
    expected = torch.tensor([[0.4, 0.2], [0.0, 0.9]])
    torch.testing.assert_close(kv_head_scores(scores, 2), expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[NeedlePrompt]]:
    """Note the prompt of every instance that is measured."""
    made: list[NeedlePrompt] = []

    def counting(model: Any, tokenizer: Any, probe: Any, prompt: Any, n: int) -> Any:
        made.append(prompt)
        return run_instance(model, tokenizer, probe, prompt, n)

    monkeypatch.setattr(retrieval, "run_instance", counting)
    return made


def profile(model_dir: str, out: Path, settings: RetrievalSettings = SMALL) -> Any:
    path = profile_retrieval(model_dir, settings, out, progress=False)
    return json.loads(path.read_text())


def test_the_profile_has_its_format_and_a_line_per_layer(
    model_dir: str, tmp_path: Path
) -> None:
    found = profile(model_dir, tmp_path)
    assert found["format"] == "kvserve-retrieval/1"
    assert found["model"] == "tiny"
    assert (found["num_layers"], found["num_query_heads"]) == (LAYERS, QUERY_HEADS)
    assert [len(row) for row in found["query_head_scores"]] == [QUERY_HEADS] * LAYERS
    assert [len(row) for row in found["kv_head_scores"]] == [KV_HEADS] * LAYERS
    assert found["settings"]["data"] == "northanger_abbey"
    assert found["settings"]["max_length"] == SMALL.max_length
    assert found["instances"] == {"run": 4, "kept": 4}
    lines = (tmp_path / "retrieval.json").read_text().splitlines()
    assert sum(line.startswith("    [") for line in lines) == 2 * LAYERS
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_the_retrieval_policy_reads_the_profile(model_dir: str, tmp_path: Path) -> None:
    found = profile(model_dir, tmp_path)
    shape = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8)
    scores = load_head_scores(str(tmp_path / "retrieval.json"), shape)
    assert scores == found["kv_head_scores"]


def test_an_interrupted_run_goes_on_where_it_was(
    model_dir: str,
    tmp_path: Path,
    calls: list[NeedlePrompt],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uninterrupted = profile(model_dir, tmp_path / "a")
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "fresh"))
    with interrupted(retrieval, "run_instance", calls, after=2):
        profile(model_dir, tmp_path / "b")
    unfinished = tmp_path / "b" / retrieval.UNFINISHED
    assert json.loads(unfinished.read_text())["instances"] == {"run": 2, "kept": 2}
    shape = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8)
    assert len(load_head_scores(str(unfinished), shape)) == LAYERS
    retrieval._show_unfinished(tmp_path / "b")
    assert "2 needles, of which 2 were found" in capsys.readouterr().out
    assert profile(model_dir, tmp_path / "b") == uninterrupted
    assert len(calls) == SMALL.instances
    assert not unfinished.exists()


def test_a_finished_run_is_not_measured_again(
    model_dir: str, tmp_path: Path, calls: list[NeedlePrompt]
) -> None:
    first = profile(model_dir, tmp_path / "a")
    assert profile(model_dir, tmp_path / "b") == first
    assert len(calls) == SMALL.instances


def test_a_half_written_line_is_measured_again(
    model_dir: str, tmp_path: Path, private_cache: Path, calls: list[NeedlePrompt]
) -> None:
    first = profile(model_dir, tmp_path / "a")
    (store,) = (private_cache / "profiles").iterdir()
    store.write_text(store.read_text()[:-20])
    for _ in range(2):
        assert profile(model_dir, tmp_path / "b") == first
    assert len(calls) == SMALL.instances + 1


def test_other_settings_are_measured_anew(
    model_dir: str, tmp_path: Path, calls: list[NeedlePrompt]
) -> None:
    profile(model_dir, tmp_path)
    other = RetrievalSettings(**{**vars(SMALL), "seed": 1})
    profile(model_dir, tmp_path, other)
    assert len(calls) == 2 * SMALL.instances


def test_a_model_that_finds_nothing_is_refused(model_dir: str, tmp_path: Path) -> None:
    strict = RetrievalSettings(**{**vars(SMALL), "min_recall": 0.5})
    with pytest.raises(UserError, match="tiny found none of 4 needles") as caught:
        profile(model_dir, tmp_path, strict)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "retrieval.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": 0}, "--lengths 0"),
        ({"depths": -1}, "--depths -1"),
        ({"needles": 0}, "--needles 0"),
        ({"max_decode_tokens": 0}, "--max-decode-tokens 0"),
        ({"min_length": 50}, "--min-length 50"),
        ({"max_length": 400}, "--max-length 400"),
        ({"gate_steps": -1}, "--gate-steps -1"),
        ({"gate_length": 511}, "--gate-length 511"),
    ],
)
def test_settings_out_of_range_name_their_flag(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        RetrievalSettings(**changes)  # type: ignore[arg-type]


def test_a_length_beyond_the_models_context_is_refused(
    model_dir: str, tmp_path: Path
) -> None:
    changes: dict[str, Any]
    for flag, changes in (
        ("--max-length", {"max_length": 1024}),
        ("--gate-length", {"gate_steps": 1, "gate_length": 1025}),
    ):
        too_long = RetrievalSettings(**{**vars(SMALL), **changes})
        with pytest.raises(UserError, match=f"{flag}: tiny reads at most 1024 tokens"):
            profile(model_dir, tmp_path, too_long)


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        profile(str(tmp_path / "none"), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_line_has_the_defaults_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    retrieval.add_arguments(parser)
    args = parser.parse_args([])
    assert args.model is None
    found = {field.name: getattr(args, field.name) for field in fields(SMALL)}
    assert RetrievalSettings(**found) == RetrievalSettings()
    assert "kvserve profile retrieval" in parser.format_help()


def test_the_command_measures_and_says_what_it_wrote(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    retrieval.add_arguments(parser)
    flags = {field.name: getattr(SMALL, field.name) for field in fields(SMALL)}
    command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    args = parser.parse_args([model_dir, "--out", str(tmp_path / "out"), *command])
    assert retrieval.run(args) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 needles" in printed
    assert str(tmp_path / "out" / "retrieval.json") in printed


def test_the_policy_ranks_by_gates_where_they_were_trained(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "_NEEDLES", (1, 2))
    gated = RetrievalSettings(
        **{**vars(SMALL), "gate_steps": 2, "gate_length": 1024, "gate_penalty": 0.5}
    )
    found = profile(model_dir, tmp_path, gated)
    shape = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8)
    scores = load_head_scores(str(tmp_path / "retrieval.json"), shape)
    assert scores == found["kv_head_gates"] != found["kv_head_scores"]


def test_the_shipped_profile_ranks_the_known_retrieval_heads_first() -> None:
    shape = ModelShape(EMBEDDED_MODEL, 30, 9, 3, 64)
    path = files("policies") / "profiles" / EMBEDDED_MODEL / "retrieval.json"
    known = {(17, 1), (18, 2), (20, 2)}
    assert known <= top_heads(json.loads(path.read_text())["kv_head_scores"], 0.05)
    assert known <= top_heads(load_head_scores(None, shape), 0.2)
