# SPDX-License-Identifier: Apache-2.0
"""Elastic spans: published examples, groups of query heads, malformed plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvserve.errors import UserError
from policies.base import FULL, HeadBudget, ModelShape
from policies.moa import MoA, span

MODEL = ModelShape("toy", 2, 4, 2, 8, max_tokens=8192)
ALPHAS = [[0, 1024, -1024, 0], [0, 0, 0, 0]]
BETAS = [[0.125, 0.125, 1.0, 0.0], [0.0, 1.0, 0.25, 0.125]]


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return write(tmp_path, {"alphas": ALPHAS, "betas": BETAS})


def write(folder: Path, data: Any) -> str:
    path = folder / "plan.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


@pytest.mark.parametrize(
    ("alpha", "beta", "spans"),
    [
        (0, 0.125, [256, 512, 1024, 2048]),
        (-1024, 1.0, [1024, 3072, 7168, 15360]),
        (1024, 0.125, [1280, 1536, 2048, 3072]),
        (1024, 0, [1024, 1024, 1024, 1024]),
        (-8192, 0, [128, 128, 128, 128]),
        (0, 1, [2048, 4096, 8192, 16384]),
        (0, 0.05, [128, 256, 448, 832]),
    ],
)
def test_spans_are_those_of_the_paper(
    alpha: float, beta: float, spans: list[int]
) -> None:
    lengths = (2048, 4096, 8192, 16384)
    assert [span(alpha, beta, length) for length in lengths] == spans


def test_a_kv_head_keeps_the_largest_span_of_its_group(plan: str) -> None:
    first, second = MoA(plan=plan).budgets(MODEL, 8192)
    assert first == (HeadBudget(64, 2048 - 64), HeadBudget(64, 7168 - 64))
    assert second == (FULL, HeadBudget(64, 2048 - 64))


def test_a_plan_per_kv_head_is_taken_as_it_is(tmp_path: Path) -> None:
    rules = {"alphas": [[0, 1024]] * 2, "betas": [[0.125, 0.125]] * 2}
    budgets = MoA(plan=write(tmp_path, rules)).budgets(MODEL, 8192)
    assert budgets == ((HeadBudget(64, 960), HeadBudget(64, 1984)),) * 2


def test_spans_are_made_for_the_request_or_for_a_length(plan: str) -> None:
    shorter = MoA(plan=plan).budgets(MODEL, 4096)
    assert MoA(plan=plan, length=4096).budgets(MODEL, 8192) == shorter
    assert MoA(plan=plan).budgets(MODEL, 8192) != shorter


def test_the_density_that_groups_cost_is_said(plan: str) -> None:
    asked = (1024 + 2048 + 7168 + 128 + 128 + 8192 + 2048 + 1024) / 8 / 8192
    got = (2048 + 7168 + 8192 + 2048) / 4 / 8192
    remark = MoA(plan=plan).remark(MODEL)
    assert f"asks for {asked:.1%}" in remark
    assert remark.endswith(f"{got:.1%}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "malformed"),
        ({"alphas": ALPHAS}, "malformed .'betas'"),
        ({"alphas": ALPHAS, "betas": BETAS[:1]}, "malformed"),
        ({"alphas": [["x"] * 4] * 2, "betas": BETAS}, "malformed"),
        ({"alphas": [[10**400] * 4] * 2, "betas": BETAS}, "malformed"),
        ({"alphas": [[float("nan")] * 4] * 2, "betas": BETAS}, "malformed"),
        ({"alphas": ALPHAS[:1], "betas": BETAS[:1]}, "another model: 1 layers x 4"),
        ({"alphas": [[0] * 3] * 2, "betas": [[0] * 3] * 2}, "2 layers x 3 heads"),
        ({"alphas": [], "betas": []}, "0 layers x no heads"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MoA(plan=write(tmp_path, data)).budgets(MODEL, 8192)
    assert "\n" not in str(caught.value)


def test_spans_for_more_than_the_model_reads_are_refused(plan: str) -> None:
    with pytest.raises(UserError, match="length=9000: toy is served up to 8192"):
        MoA(plan=plan, length=9000).budgets(MODEL, 8192)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(UserError, match="--policy moa: no plan ships for toy; pass"):
        MoA().budgets(MODEL, 8192)


def own_plans(**entries: Any) -> dict[str, Any]:
    """A file of kvserve's own: an eighth of everything, or a half, per KV head."""
    plans = [
        {"budget": budget, "alphas": [[0, 0]] * 2, "betas": [[budget] * 2] * 2}
        for budget in (0.125, 0.5)
    ]
    return {"format": "kvserve-moa/1", "plans": plans, **entries}


@pytest.mark.parametrize(("budget", "kept"), [(None, 4096), (0.5, 4096), (0.125, 1024)])
def test_a_budget_chooses_among_our_plans(
    tmp_path: Path, budget: float | None, kept: int
) -> None:
    policy = MoA(plan=write(tmp_path, own_plans()), budget=budget)
    assert policy.budgets(MODEL, 8192) == ((HeadBudget(64, kept - 64),) * 2,) * 2
    assert policy.remark(MODEL) == f"{kept / 8192:.1%} of the KV cache of 8192 tokens"


@pytest.mark.parametrize(
    ("data", "budget", "message"),
    [
        (own_plans(), 0.3, r"budget=0.3: .* has plans for 0.125, 0.5; choose one"),
        (own_plans(format="other"), None, "malformed .format 'other'"),
        (own_plans(plans=[{}]), None, "malformed .'budget'"),
        ({"alphas": ALPHAS, "betas": BETAS}, 0.5, "budget=0.5: .* is a single plan"),
    ],
)
def test_a_budget_without_a_plan_is_refused(
    tmp_path: Path, data: Any, budget: float | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MoA(plan=write(tmp_path, data), budget=budget).budgets(MODEL, 8192)
    assert "\n" not in str(caught.value)
