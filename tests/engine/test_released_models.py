# SPDX-License-Identifier: Apache-2.0
"""Plans of models that people serve, from their configurations alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan_models
from benchmarks.plan_models import LENGTHS, STEP, STOCK_BLOCK
from kvserve.cli import main
from kvserve.engine.start.layers import model_shape_of, state_layers
from tests.reference.released_models import MODELS, Released

pytestmark = pytest.mark.engine

NUMBER = 2
"""Bytes of one, in bfloat16."""


def token_bytes(model: Released) -> int:
    """Bytes of a token's keys and values in one layer."""
    return 2 * model.kv_heads * model.head_size * NUMBER


def window_tokens(model: Released) -> int:
    """Tokens that stock vLLM sets aside in a layer with a window, in whole blocks."""
    return (-(-(model.window - 1 + STEP) // STOCK_BLOCK) + 1) * STOCK_BLOCK


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_plan_takes_what_the_architecture_says(
    tmp_path: Path, model: Released
) -> None:
    folder = model.write(tmp_path)
    of_token, full_layers = token_bytes(model), model.cached - model.windowed
    found = plan_models.taken(folder, plan_models.write_scores(model, folder))
    for one in found:
        full = full_layers * one.tokens * of_token + model.state_bytes
        assert one.stock == full + model.windowed * window_tokens(model) * of_token
        assert one.full == one.stock - model.windowed * of_token * (
            window_tokens(model) - _held_of_window(model)
        )
        windows = model.windowed * _held_of_window(model) * of_token
        kept = one.retrieval - model.state_bytes - windows
        assert kept / (full - model.state_bytes) == pytest.approx(0.25, rel=0.02)
    assert plan_models.row(model, found) in _rows(plan_models.PAGE.read_text())


def _held_of_window(model: Released) -> int:
    """Tokens of whole pages of 32 that a query's window may touch."""
    return (-(-(model.window - 1) // 32) + 1) * 32 if model.window else 0


def _rows(page: str) -> list[list[str]]:
    table = plan_models.between_marks(page, plan_models.REQUESTS)[1]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_configuration_tells_each_layer(tmp_path: Path, model: Released) -> None:
    config = plan_models.configured(model.write(tmp_path), "full", LENGTHS[0])
    shape = model_shape_of(config)
    assert shape.num_layers == model.cached
    assert (shape.num_query_heads, shape.num_kv_heads) == (
        model.query_heads,
        model.kv_heads,
    )
    assert shape.head_size == model.head_size
    seen = [local.tokens for local in shape.local if local]
    assert seen == [model.window] * model.windowed
    assert state_layers(config) == model.states
    assert plan_models.of_one_request(config) == model.state_bytes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gpt-oss-20b",
            "24 layers of 8 KV heads of 64 numbers, 12 see a window of 128 tokens, "
            "12 see everything",
        ),
        (
            "Qwen3-Next-80B-A3B",
            "12 layers of 2 KV heads of 256 numbers, 12 see everything, 36 layers "
            "keep a state",
        ),
    ],
)
def test_plan_says_what_layers_see_and_what_states_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    model = next(one for one in MODELS if one.name == name)
    argv = ["plan", str(model.write(tmp_path)), "--kv-memory", "16GiB"]
    argv += ["--max-model-len", "32768", "--max-num-seqs", "7"]
    for several in ([], ["--policy", "sink-recent", "--policy", "full"]):
        assert main([*argv, *several]) == 0
        shown = capsys.readouterr()
        assert f"kvserve: model {name}: {said}\n" in shown.err
        assert ("states of 7 requests" in shown.out) == bool(model.states)
