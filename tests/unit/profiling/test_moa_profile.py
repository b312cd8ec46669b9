# SPDX-License-Identifier: Apache-2.0
"""``kvserve profile moa`` on a tiny random Llama."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from kvserve.errors import UserError
from kvserve.models import EMBEDDED_MODEL
from kvserve.plan.page_plan import PagePlan
from kvserve.profiling import moa, span_search
from kvserve.profiling.answers import divergence
from kvserve.profiling.moa import profile_moa
from kvserve.profiling.span_search import MoASettings
from kvserve.profiling.spans import SpanAttention
from policies.base import HeadBudget, ModelShape
from policies.moa import MoA
from tests.reference.visibility import visible_positions
from tests.unit.profiling.conftest import interrupted
from tests.unit.tiny_llama import (
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    save_tiny_llama,
    tiny_llama,
)

TOKENS = 640
SMALL = MoASettings(
    lengths=(1536, 1600),
    items=2,
    budgets=(0.5, 0.7),
    intervals=1,
    validation_length=1664,
    validation_items=2,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_tokens=2048)


@pytest.fixture(scope="module")
def measured(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plans of a run without a cache are."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSERVE_CACHE", str(out / "cache"))
        return profile_moa(model_dir, SMALL, out, progress=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every prompt whose influence is measured."""
    made: list[Any] = []
    measure = span_search.measure_influence

    def counting(*arguments: Any) -> Any:
        made.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(span_search, "measure_influence", counting)
    return made


def profile(model_dir: str, out: Path, settings: MoASettings = SMALL) -> dict[str, Any]:
    return read(profile_moa(model_dir, settings, out, progress=False))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def changed(**changes: Any) -> MoASettings:
    return MoASettings(**{**vars(SMALL), **changes})


@pytest.mark.parametrize("kept", [128, 192, 448])
def test_a_span_shows_what_the_engine_shows(kept: int) -> None:
    model = tiny_llama(50)
    attention = SpanAttention()
    attention.attach(model)
    generator = torch.Generator().manual_seed(kept)
    token_ids = torch.randint(0, 50, (1, TOKENS), generator=generator)
    attention.spans = [[kept, TOKENS]] * LAYERS
    with torch.no_grad():
        found = model(token_ids, use_cache=False).logits
    budgets = ((HeadBudget(64, kept - 64), HeadBudget()),)
    plan = PagePlan.from_budgets(budgets, page_size=32)
    hidden = torch.full((1, QUERY_HEADS, TOKENS, TOKENS), -1e9)
    for head in range(QUERY_HEADS):
        for query in range(TOKENS):
            lane = head * KV_HEADS // QUERY_HEADS
            hidden[0, head, query, visible_positions(plan, 0, lane, query)] = 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(token_ids, attention_mask=hidden).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_spans_of_everything_are_the_dense_model() -> None:
    model = tiny_llama(50)
    attention = SpanAttention()
    attention.attach(model)
    token_ids = torch.arange(200)[None] % 50
    with torch.no_grad():
        dense = model(token_ids, use_cache=False).logits[0].log_softmax(-1)
        attention.spans = [[200] * KV_HEADS] * LAYERS
        other = model(token_ids, use_cache=False).logits[0].log_softmax(-1)
    assert float(divergence(dense, other)) == pytest.approx(0, abs=1e-6)
    assert divergence(dense, dense.roll(1, 0)) > 0.01


def test_the_policy_serves_the_plans_within_their_budgets(measured: Path) -> None:
    found = read(measured)
    assert measured.name == "moa.json"
    assert measured.with_name("moa.png").stat().st_size > 5000
    shape = ModelShape("tiny", LAYERS, QUERY_HEADS, KV_HEADS, 8, max_tokens=2048)
    for plan in found["plans"]:
        policy = MoA(plan=str(measured), budget=plan["budget"])
        for tokens in (*SMALL.lengths, SMALL.validation_length):
            lanes = [lane for layer in policy.budgets(shape, tokens) for lane in layer]
            kept = [
                tokens if lane.recent is None else lane.sinks + lane.recent
                for lane in lanes
            ]
            share = sum(kept) / len(kept) / tokens
            assert share == pytest.approx(plan["density"][str(tokens)], abs=1e-4)
            assert 0.9 * plan["budget"] <= share <= plan["budget"]
        for layer in zip(plan["alphas"], plan["betas"], strict=True):
            assert len(set(zip(*layer, strict=True))) <= 2


def test_the_plan_nearest_to_the_dense_model_is_chosen(measured: Path) -> None:
    found = read(measured)
    assert [plan["budget"] for plan in found["plans"]] == [0.5, 0.7]
    for plan in found["plans"]:
        others = [p for p in found["pareto"] if p["budget"] == plan["budget"]]
        assert plan in others
        assert plan["validation"] == min(p["validation"] for p in others)


def test_an_interrupted_run_goes_on_where_it_was(
    model_dir: str, tmp_path: Path, calls: list[Any], measured: Path
) -> None:
    with interrupted(span_search, "measure_influence", calls, after=3):
        profile(model_dir, tmp_path)
    assert profile(model_dir, tmp_path) == read(measured)
    assert len(calls) == len(SMALL.lengths) * SMALL.items


def test_a_finished_run_is_not_measured_again(
    model_dir: str, tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = profile(model_dir, tmp_path / "a")
    monkeypatch.setattr(span_search, "answer_log_probs", None)
    assert profile(model_dir, tmp_path / "b") == first
    assert len(calls) == len(SMALL.lengths) * SMALL.items


def test_another_measure_is_measured_anew(
    model_dir: str, tmp_path: Path, calls: list[Any]
) -> None:
    joint = profile(model_dir, tmp_path / "a")
    entries = profile(model_dir, tmp_path / "b", changed(measure="entries"))
    assert len(calls) == 2 * len(SMALL.lengths) * SMALL.items
    assert entries["plans"][0]["loss"] != joint["plans"][0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 0}, "--items 0: must be at least 1"),
        ({"intervals": 0}, "--intervals 0"),
        ({"validation_items": -1}, "--validation-items -1"),
        ({"lengths": (2048, 1024)}, "--lengths 2048 1024: must ascend"),
        ({"lengths": (256, 512)}, "--lengths 256 512: .* at least 512"),
        ({"lengths": (1000,)}, "--lengths 1000: must be multiples of 64"),
        ({"validation_length": 1024}, "--validation-length 1024: .* 1600"),
        ({"budgets": (0.5, 1.0)}, r"--budgets 1\.0: must be between 0 and 1"),
        ({"measure": "guess"}, "--measure guess: must be joint or entries"),
    ],
)
def test_settings_out_of_range_name_their_flag(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        changed(**changes)


def test_a_length_beyond_the_models_context_is_refused(
    model_dir: str, tmp_path: Path
) -> None:
    for flag, settings in (
        ("--lengths", changed(lengths=(1536, 2112), validation_length=2112)),
        ("--validation-length", changed(validation_length=2049)),
    ):
        with pytest.raises(UserError, match=f"{flag}: tiny reads at most 2048 tokens"):
            profile(model_dir, tmp_path, settings)


def test_facts_that_do_not_fit_are_one_line(model_dir: str, tmp_path: Path) -> None:
    # A byte is a token here, so eight facts and their reply take more than 512.
    with pytest.raises(UserError, match="--lengths 512: 8 needles do not fit"):
        profile(model_dir, tmp_path, changed(lengths=(512,)))


def test_a_budget_that_no_plan_meets_is_one_line(
    model_dir: str, tmp_path: Path
) -> None:
    # The least span, 128 tokens, is a twelfth of the shortest length.
    with pytest.raises(UserError, match=r"--budgets 0\.05: no plan keeps that little"):
        profile(model_dir, tmp_path, changed(budgets=(0.05,)))


def test_a_text_too_short_to_hide_facts_in_is_one_line(
    model_dir: str, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("It was a dark night. ")
    with pytest.raises(UserError, match=r"--data .*short\.txt: has 21 characters"):
        profile_moa(model_dir, SMALL, tmp_path, progress=False, data=short)


def test_the_command_line_has_the_defaults_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    moa.add_arguments(parser)
    args = parser.parse_args([])
    found = {field.name: getattr(args, field.name) for field in fields(SMALL)}
    assert MoASettings(**found) == MoASettings()
    assert "kvserve profile moa" in parser.format_help()


def test_the_command_measures_and_says_what_it_wrote(
    model_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    moa.add_arguments(parser)
    out = tmp_path / "out"
    flags = "--lengths 1536 --items 1 --budgets 0.5 --validation-length 1600"
    args = parser.parse_args([model_dir, "--out", str(out), *flags.split()])
    assert moa.run(args) == 0
    printed = capsys.readouterr().out
    assert "of memory besides the model" in printed
    assert "budget 0.5: keeps" in printed
    assert str(out / "moa.json") in printed


def test_the_shipped_plans_are_of_the_embedded_model() -> None:
    shape = ModelShape(EMBEDDED_MODEL, 30, 9, 3, 64, max_tokens=8192)
    for budget in (0.25, 0.5):
        lanes = MoA(budget=budget).budgets(shape, 4096)
        kept = [
            4096 if lane.recent is None else lane.sinks + lane.recent
            for layer in lanes
            for lane in layer
        ]
        assert 0.9 * budget <= sum(kept) / len(kept) / 4096 <= budget
