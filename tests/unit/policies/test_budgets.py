# SPDX-License-Identifier: Apache-2.0
"""Budgets: one way to write them, and what policies make of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kvserve.errors import UserError
from kvserve.plan.dense import DenseRule
from kvserve.plan.streaming import StreamRule
from policies.base import DensePolicy, Local, ModelShape, StreamingPolicy
from policies.budgets import (
    RULES,
    PolicySpec,
    arguments_for,
    split_policies,
)
from policies.registry import available_policies, create_policy
from policies.shares import Budget

SHAPE = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64)
NAMES = sorted({cls.name for cls in available_policies().values()} - {"full"})


def kept_share(spec: PolicySpec, length: int) -> float:
    """Pages of a prompt of ``length`` tokens against the full cache's."""
    arguments = spec.arguments(length, SHAPE)
    policy = create_policy(spec.name, arguments)
    shape = dataclasses.replace(SHAPE, max_tokens=length)
    if isinstance(policy, DensePolicy):
        dense = DenseRule(policy, shape, 32, length)
        return dense.plan(length).pages(length) / dense.full.pages(length)
    assert isinstance(policy, StreamingPolicy)
    rule = StreamRule(policy, shape, policy.page_size or 32, length)
    return rule.pages(length) / rule.full.pages(length)


@pytest.fixture
def moa_plan(tmp_path: Path) -> str:
    """A plan of the authors' format, which has no budgets to choose from."""
    path = tmp_path / "moa.json"
    betas = [[(1 + (layer + head) % 4) / 5 for head in range(9)] for layer in range(30)]
    path.write_text(json.dumps({"alphas": [[0.0] * 9] * 30, "betas": betas}))
    return str(path)


@pytest.mark.parametrize(
    ("text", "share", "tokens"),
    [("0.25", 0.25, None), ("25%", 0.25, None), ("1", 1.0, None), ("512", None, 512)],
)
def test_budgets_are_shares_or_tokens(
    text: str, share: float | None, tokens: int | None
) -> None:
    assert Budget.parse(text) == Budget(share, tokens)


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "0%", "150%", "1.5", "nan"])
def test_a_bad_budget_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UserError, match=r"budget=.*such as 0\.25 or 25%"):
        Budget.parse(text)


def test_a_spec_has_a_name_own_parameters_and_a_budget() -> None:
    spec = PolicySpec.parse("snapkv:window=64,budget=0.5")
    assert (spec.name, spec.own) == ("snapkv", (("window", "64"),))
    assert spec.arguments(1024, SHAPE) == {"capacity": 512, "window": "64"}


def test_own_parameters_overrule_the_budget() -> None:
    spec = PolicySpec.parse("retrieval:budget=0.25,full_ratio=0.1")
    assert spec.arguments(4096, SHAPE)["full_ratio"] == "0.1"


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_has_a_rule_that_is_written_down(name: str) -> None:
    assert name in RULES


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("budget", ["0.25", "0.5", "512"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"moa"}))
def test_every_policy_keeps_about_its_budget(
    name: str, budget: str, length: int
) -> None:
    asked = Budget.parse(budget).share_of(length)
    kept = kept_share(PolicySpec.parse(f"{name}:budget={budget}"), length)
    # A lane is whole pages, and shards come in whole strides.
    assert asked - 0.08 <= kept <= asked + 0.04


@pytest.mark.parametrize("budget", ["0.1", "0.25", "0.4", "1024"])
def test_moa_shortens_its_spans_to_a_budget_that_no_plan_has(
    moa_plan: str, budget: str
) -> None:
    # The rule reads the plan that ships; here, one that was named.
    spec = PolicySpec.parse(f"moa:plan={moa_plan},budget={budget}")
    asked = Budget.parse(budget).share_of(4096)
    assert asked - 0.05 <= kept_share(spec, 4096) <= asked + 0.03


def test_moa_says_what_its_plan_has_when_a_budget_is_too_large(moa_plan: str) -> None:
    spec = PolicySpec.parse(f"moa:plan={moa_plan},budget=0.01")
    with pytest.raises(UserError, match="--policy moa"):
        spec.arguments(4096, SHAPE)


def test_text_arguments_and_files_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a:b.toml"
    path.write_text('policy = "h2o"\nnorm = "count"\nbudget = "25%"\n')
    served = dataclasses.replace(SHAPE, max_tokens=4096)
    expected = create_policy("h2o", {"norm": "count", **dict.fromkeys(HALVES, 0.125)})
    for spec in (
        PolicySpec.parse("h2o:budget=25%,norm=count"),
        PolicySpec.parse("h2o", {"budget": "25%", "norm": "count"}),
        PolicySpec.parse("h2o:norm=count", {"budget": 0.25}),
        PolicySpec.parse("h2o:budget=1024,norm=count"),
        PolicySpec.parse(str(path)),
    ):
        assert spec.create(served) == expected
        assert spec.name == "h2o"


HALVES = ("heavy_ratio", "recent_ratio")


def test_a_budget_overrules_a_file_and_is_overruled_by_what_is_typed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('policy = "sink-recent"\nsinks = 64\nrecent = 96\nbudget = 128\n')
    served = dataclasses.replace(SHAPE, max_tokens=1024)
    for arguments, sinks, recent in (
        ({}, 32, 96),
        ({"budget": "0.5"}, 32, 480),
        ({"budget": "0.5", "sinks": 128}, 128, 480),
    ):
        policy = PolicySpec.parse(str(path), arguments).create(served)
        assert policy == create_policy(
            "sink-recent", {"sinks": sinks, "recent": recent}
        )


def test_a_parameter_that_is_set_twice_is_refused() -> None:
    with pytest.raises(UserError, match="--policy-arg norm: --policy h2o:norm=count"):
        PolicySpec.parse("h2o:norm=count", {"norm": "none"})
    with pytest.raises(UserError, match="--policy h2o: norm: given twice"):
        PolicySpec.parse("h2o:norm=count,norm=none")


def test_a_list_of_policies_keeps_parameters_with_their_policy() -> None:
    assert split_policies("none,h2o:budget=25%,norm=count,./my.toml,full") == [
        "none",
        "h2o:budget=25%,norm=count",
        "./my.toml",
        "full",
    ]


def test_aliases_and_files_have_the_rule_of_their_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('policy = "sink-recent"\nsinks = 64\n')
    for name in ("streaming-llm", str(path)):
        arguments = PolicySpec.parse(f"{name}:budget=0.5").arguments(1024, SHAPE)
        assert arguments["recent"] == 480


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("full:budget=0.5", 1024, "keeps everything and takes no budget"),
        ("sink-recent:budget=0.01", 1024, "give a larger budget"),
        ("snapkv:budget=32", 1024, "give a larger budget"),
        ("retrieval:budget=0.01", 1024, "give a larger budget"),
    ],
)
def test_a_budget_that_a_policy_cannot_have_is_one_line(
    text: str, length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        PolicySpec.parse(text).arguments(length, SHAPE)
    assert str(raised.value).startswith(f"--policy {text}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snap", "unknown"),
        ("snapkv:capacity", "expected key=value"),
        ("snapkv:size=4", "no such argument"),
        ("snapkv:capacity=big", "expected int"),
    ],
)
def test_a_malformed_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PolicySpec.parse(text)


def test_no_policy_gets_more_than_its_share_of_whole_pages() -> None:
    assert arguments_for("snapkv", 0.3, 1000, SHAPE) == {"capacity": 288}
    assert arguments_for("sink-recent", 0.3, 1000, SHAPE)["recent"] == 256


def test_a_budget_is_of_the_layers_whose_queries_see_everything(
    tmp_path: Path,
) -> None:
    own = (Local(512),) * 5 + (None,)
    shape = ModelShape("gemma", 18, 4, 1, 256, local=own * 3)
    gates = tmp_path / "gates.tsv"
    gates.write_text("1.0\n" * 18)
    spec = PolicySpec.parse(f"retrieval:budget=0.5,profile={gates}")
    expected = {"full_ratio": 0.3333, "sinks": 32, "recent": 480}
    assert spec.arguments(2048, shape) == {"profile": str(gates), **expected}
    assert spec.arguments(512, shape.up_to(512))["full_ratio"] == round(4 / 18, 4)
