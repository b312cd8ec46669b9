# SPDX-License-Identifier: Apache-2.0
"""``kvserve profile scorer``: what it learns, what it writes, how it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvserve.errors import UserError
from kvserve.profiling import scorer, scorer_steps
from kvserve.profiling.head_shares import LEVELS
from kvserve.profiling.score_training import train_network
from kvserve.profiling.scorer import ScorerSettings, profile_scorer
from policies.base import ModelShape
from policies.expected_attention import ExpectedAttention
from policies.history import load_shares
from policies.kvzap import KVzap, foretell
from policies.thinning import Groups
from tests.unit.profiling.conftest import interrupted
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS

SMALL = ScorerSettings(2, 500, facts=1, width=4, epochs=1, prompts=2, recited=2)
SHAPE = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8, max_tokens=4096)


def test_policies_read_what_is_written(
    model_dir: str, tmp_path: Path, private_cache: Path
) -> None:
    out = tmp_path / "out"
    weights, queries, history = profile_scorer(model_dir, SMALL, out, progress=False)
    policy = KVzap(weights=str(weights), profile=str(history))
    other = ExpectedAttention(queries=str(queries), profile=str(history))
    assert other.budgets(SHAPE, 4096) == policy.budgets(SHAPE, 4096)
    keeps = [head.keep for layer in policy.budgets(SHAPE, 4096) for head in layer]
    assert 0 < sum(keeps) < 128 * len(keeps)
    groups = torch.randn(2, 3, KV_HEADS, 128, 8).unbind()
    seen = Groups(groups[0], groups[1], torch.zeros(3, 128, dtype=torch.long))
    for layer in range(LAYERS):
        for one in (policy, other):
            assert one.scores(SHAPE, layer, seen).isfinite().all()
    settings = json.loads(history.read_text())["settings"]
    assert settings["texts"] == 2
    assert [file.name for file in (private_cache / "profiles").iterdir()] == []
    assert {*out.iterdir()} == {weights, queries, history}


@pytest.mark.parametrize(
    ("name", "after", "calls_in_all"),
    [
        ("read_and_repeat", 1, 2),
        ("train_network", 2, LAYERS),
        ("measure_history", 1, 2),
    ],
)
def test_a_run_that_was_stopped_goes_on(
    model_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: int,
    calls_in_all: int,
) -> None:
    whole = profile_scorer(model_dir, SMALL, tmp_path / "whole", progress=False)
    calls: list[Any] = []
    counted = getattr(scorer_steps, name)

    def count(*arguments: Any) -> Any:
        found = counted(*arguments)
        calls.append(found)
        return found

    monkeypatch.setattr(scorer_steps, name, count)
    with interrupted(scorer_steps, name, calls, after):
        profile_scorer(model_dir, SMALL, tmp_path / "parts", progress=False)
    assert len(calls) == after
    parts = profile_scorer(model_dir, SMALL, tmp_path / "parts", progress=False)
    assert len(calls) == calls_in_all
    for kind in range(2):
        one, other = load_file(whole[kind]), load_file(parts[kind])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole[2].read_text() == parts[2].read_text()


def test_a_network_learns_what_keys_and_values_tell() -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 32, 8, generator=random) * 3 + 5
    scores = torch.stack([inputs[..., 0], -inputs[..., 5]], 1).sub(5).div(3).sigmoid()
    network = train_network(inputs[:48], scores[:48], width=16, epochs=30, seed=0)
    guesses = foretell(network, inputs[48:])
    kept, best = (part.topk(8).indices for part in (guesses, scores[48:]))
    same = (kept[..., :, None] == best[..., None, :]).any(-1).float().mean()
    assert same > 0.85


def test_the_file_lists_each_layer_of_the_model(model_dir: str, tmp_path: Path) -> None:
    *_, history = profile_scorer(model_dir, SMALL, tmp_path, progress=False)
    shares = load_shares(str(history), SHAPE)
    assert shares is not None
    assert len(shares) == len(LEVELS) + 2


def test_the_command_says_what_it_wrote_and_what_it_cannot(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    scorer.add_arguments(parser)
    small = ["--texts", "1", "--facts", "1", "--width", "4", "--epochs", "1"]
    small += ["--prompts", "1", "--recited", "2"]
    given = [model_dir, "--out", str(tmp_path), *small]
    assert scorer.run(parser.parse_args([*given, "--tokens", "500"])) == 0
    assert str(tmp_path / "kvzap.safetensors") in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--tokens: tiny reads at most 1024 tokens"):
        scorer.run(parser.parse_args([*given, "--tokens", "600"]))
    with pytest.raises(UserError, match=r"^--texts 0: must be at least 1"):
        ScorerSettings(texts=0)
    with pytest.raises(UserError, match=r"^--tokens 300: must be at least 384"):
        ScorerSettings(tokens=300)
