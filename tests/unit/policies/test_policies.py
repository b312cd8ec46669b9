# SPDX-License-Identifier: Apache-2.0
"""The suite that every policy joins, and how policies are built from user input."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvserve.errors import UserError
from kvserve.plan.page_plan import PagePlan
from policies.base import (
    FULL,
    Capabilities,
    DensePolicy,
    HeadBudget,
    ModelShape,
    Policy,
    Prompt,
    StreamingPolicy,
)
from policies.expected_attention import QUERIES_FORMAT
from policies.full import Full
from policies.registry import available_policies, create_policy, parse_arguments
from policies.retrieval import Retrieval
from policies.sink_recent import SinkRecent
from tests.unit.policies.test_kvzap import write as write_weights

MODEL = ModelShape("toy", num_layers=2, num_query_heads=6, num_kv_heads=3, head_size=8)
POLICIES = sorted({*available_policies().values()}, key=lambda cls: cls.name)


def _each(base: type[Policy]) -> pytest.MarkDecorator:
    """Run a test with every policy of a kind."""
    found = [cls for cls in POLICIES if issubclass(cls, base)]
    return pytest.mark.parametrize("cls", found, ids=lambda cls: cls.name)


every_policy = _each(Policy)
every_streaming_policy = _each(StreamingPolicy)
every_dense_policy = _each(DensePolicy)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """DuoAttention gates of the toy model; the best heads are (1, 0) and (0, 2)."""
    path = tmp_path / "gates.tsv"
    path.write_text("0.1\t0.2\t0.8\n0.9\t0.3\t0.2\n")
    return str(path)


@pytest.fixture
def required(profile: str, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Arguments without which a policy cannot serve the toy model."""
    plan = tmp_path / "plan.json"
    rules = {"alphas": [[0, 0, 0]] * 2, "betas": [[1, 0, 0], [0, 0, 1]]}
    plan.write_text(json.dumps(rules))
    return {
        "retrieval": {"profile": profile},
        "moa": {"plan": str(plan)},
        "sharded": {"insist": True},
        "kvzap": {"weights": write_weights(tmp_path / "kvzap.safetensors")},
        "expected-attention": {"queries": _queries(tmp_path / "queries.safetensors")},
    }


def _queries(path: Path) -> str:
    """How queries of the toy model are distributed."""
    tensors = {"frequencies": torch.ones(4)}
    for layer in range(MODEL.num_layers):
        heads, size = MODEL.num_query_heads, MODEL.head_size
        tensors[f"{layer}.mean"] = torch.zeros(heads, size)
        tensors[f"{layer}.covariance"] = torch.zeros(heads, size, size)
    shape = "num_layers", "num_query_heads", "num_kv_heads", "head_size"
    about = {key: str(getattr(MODEL, key)) for key in shape}
    save_file(tensors, path, {"format": QUERIES_FORMAT, **about})
    return str(path)


def refusal(name: str, arguments: dict[str, Any] | None = None) -> str:
    """Create a policy in vain; return the error, which must be one line."""
    with pytest.raises(UserError) as caught:
        create_policy(name, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What holds for every policy.


@every_streaming_policy
def test_budgets_have_one_entry_per_layer_and_kv_head(
    cls: type[StreamingPolicy], required: dict[str, dict[str, Any]]
) -> None:
    budgets = cls(**required.get(cls.name, {})).budgets(MODEL, MODEL.max_tokens)
    assert [len(layer) for layer in budgets] == [3, 3]
    assert all(isinstance(head, HeadBudget) for layer in budgets for head in layer)
    plan = PagePlan.from_budgets(budgets, 32)
    assert (plan.num_layers, plan.num_kv_heads) == (2, 3)


@every_dense_policy
@pytest.mark.parametrize("tokens", [1, 40, 700, 5000])
def test_lanes_have_one_entry_per_layer_and_kv_head(
    cls: type[DensePolicy], tokens: int
) -> None:
    lanes = cls().lanes(MODEL, tokens)
    assert [len(layer) for layer in lanes] == [3, 3]
    assert all(0 < lane.keep <= tokens for layer in lanes for lane in layer)


@every_dense_policy
@pytest.mark.parametrize("tokens", [600, 1500])
def test_a_selection_fills_its_lanes_and_gives_each_head_one(
    cls: type[DensePolicy], tokens: int
) -> None:
    policy = cls()
    random = torch.Generator().manual_seed(tokens)
    window = min(policy.observation_window, tokens)
    prompt = Prompt(
        keys=torch.randn(3, tokens, 8, generator=random),
        values=torch.randn(3, tokens, 8, generator=random),
        queries=torch.randn(6, window, 8, generator=random),
        scale=1.0,
        mass=torch.rand(3, tokens, generator=random),
    )
    for layer, lanes in enumerate(policy.lanes(MODEL, tokens)):
        if all(lane.keep == tokens for lane in lanes):
            continue
        chosen = policy.select(MODEL, layer, prompt, lanes)
        assert sorted(chosen.head_of_lane) == [0, 1, 2]
        for lane, positions in zip(lanes, chosen.positions, strict=True):
            kept = positions.tolist()
            assert len(kept) == len(set(kept)) == lane.keep
            assert kept == sorted(kept)
            assert 0 <= kept[0] <= kept[-1] == tokens - 1


@every_policy
def test_a_policy_is_known_by_its_own_name(cls: type[Policy]) -> None:
    assert available_policies()[cls.name] is cls


@every_policy
def test_a_policy_carries_its_paper_and_capabilities(cls: type[Policy]) -> None:
    assert cls.paper
    assert isinstance(cls.capabilities, Capabilities)
    assert cls.capabilities.prefill in ("streaming", "dense")
    assert (cls.capabilities.prefill == "dense") == issubclass(cls, DensePolicy)
    # Pages of a prefix may be shared where the text behind it changes nothing.
    streams = cls.capabilities.prefill == "streaming"
    assert cls.capabilities.prefix_cacheable == streams
    if cls.capabilities.position_only:
        assert not cls.capabilities.scores_tokens
        assert cls.capabilities.chunk_invariant


@every_policy
def test_every_parameter_says_what_it_is(cls: type[Policy]) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata["description"]
        assert field.default is not dataclasses.MISSING


@every_policy
def test_a_value_out_of_range_is_refused_by_name(cls: type[Policy]) -> None:
    for field in dataclasses.fields(cls):
        for limit, outside in (("minimum", -1), ("maximum", 1)):
            bound = field.metadata[limit]
            if bound is None:
                continue
            create_policy(cls.name, {field.name: bound})
            message = refusal(cls.name, {field.name: bound + outside})
            assert message.startswith(f"--policy-arg {field.name}={bound + outside}: ")
            assert f"(policy {cls.name})" in message


@every_policy
def test_equal_arguments_make_equal_policies_in_every_process(
    cls: type[Policy],
) -> None:
    policy = create_policy(cls.name)
    assert policy == cls()
    assert hash(policy) == hash(cls())
    assert pickle.loads(pickle.dumps(policy)) == policy


# What each policy keeps.


def test_full_keeps_everything() -> None:
    assert Full().budgets(MODEL, MODEL.max_tokens) == ((FULL,) * 3,) * 2


def test_sink_recent_keeps_the_same_of_every_head() -> None:
    head = HeadBudget(sinks=64, recent=192)
    assert (
        SinkRecent(sinks=64, recent=192).budgets(MODEL, MODEL.max_tokens)
        == ((head,) * 3,) * 2
    )


def test_streaming_llm_is_another_name_of_sink_recent() -> None:
    assert available_policies()["streaming-llm"] is SinkRecent
    assert create_policy("streaming-llm", {"sinks": 4}) == SinkRecent(sinks=4)


def test_retrieval_keeps_everything_of_the_best_heads(profile: str) -> None:
    policy = Retrieval(profile, full_ratio=1 / 3, sinks=32, recent=96)
    rest = HeadBudget(32, 96)
    assert policy.budgets(MODEL, MODEL.max_tokens) == (
        (rest, rest, FULL),
        (FULL, rest, rest),
    )


@pytest.mark.parametrize(("ratio", "num_full"), [(0.0, 0), (1.0, 6)])
def test_retrieval_spans_from_windows_alone_to_the_full_cache(
    profile: str, ratio: float, num_full: int
) -> None:
    budgets = Retrieval(profile, full_ratio=ratio).budgets(MODEL, MODEL.max_tokens)
    assert sum(head.is_full for layer in budgets for head in layer) == num_full


def test_retrieval_without_a_profile_is_made_but_cannot_serve() -> None:
    policy = create_policy("retrieval")
    with pytest.raises(UserError, match="no profile ships for toy"):
        policy.budgets(MODEL, MODEL.max_tokens)


def test_group_size_is_query_heads_per_kv_head() -> None:
    assert MODEL.group_size == 2


# Building policies from what a user typed.


def test_values_may_be_strings(profile: str) -> None:
    typed = {"full_ratio": "0.5", "sinks": "64", "recent": "96", "profile": profile}
    policy = create_policy("retrieval", typed)
    assert policy == Retrieval(profile, full_ratio=0.5, sinks=64, recent=96)


def test_a_whole_number_will_do_for_a_ratio() -> None:
    policy = create_policy("retrieval", {"full_ratio": 1})
    assert isinstance(policy, Retrieval)
    assert isinstance(policy.full_ratio, float)


def test_an_unknown_policy_is_answered_with_those_there_are() -> None:
    message = refusal("quest")
    assert message.startswith("--policy quest: unknown; choose one of ")
    assert all(name in message for name in available_policies())


def test_an_unknown_argument_is_answered_with_those_there_are() -> None:
    message = refusal("sink-recent", {"window": 64})
    assert message.startswith("--policy-arg window: policy sink-recent has no such")
    assert message.endswith("it takes budget, recent, sinks")
    assert refusal("full", {"sinks": 1}).endswith("it takes none")


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("sinks", "many", "int"),
        ("sinks", "1.5", "int"),
        ("sinks", "nan", "int"),
        ("sinks", "", "int"),
        ("sinks", 1.5, "int"),
        ("sinks", True, "int"),
        ("sinks", None, "int"),
        ("recent", [64], "int"),
        ("full_ratio", "half", "float"),
        ("full_ratio", True, "float"),
        ("profile", 7, "str"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(
    argument: str, value: Any, kind: str
) -> None:
    message = refusal("retrieval", {argument: value})
    assert message == f"--policy-arg {argument}={value}: expected {kind}"


@pytest.mark.parametrize("value", ["nan", "NaN", float("nan")])
def test_not_a_number_is_not_a_ratio(value: Any) -> None:
    message = refusal("retrieval", {"full_ratio": value})
    assert message == "--policy-arg full_ratio: not a number (policy retrieval)"


@pytest.mark.parametrize("value", ["inf", "-inf", "1.01", -0.1])
def test_a_ratio_lies_between_0_and_1(value: Any) -> None:
    assert "must be between 0.0 and 1.0" in refusal("retrieval", {"full_ratio": value})


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    pairs = ["sinks=4", "profile=/tmp/a=b.json", "empty="]
    expected = {"sinks": "4", "profile": "/tmp/a=b.json", "empty": ""}
    assert parse_arguments(pairs) == expected


@pytest.mark.parametrize("pair", ["sinks", "=4", ""])
def test_a_pair_needs_a_key_and_an_equals_sign(pair: str) -> None:
    with pytest.raises(UserError, match="expected key=value") as caught:
        parse_arguments([pair])
    assert str(caught.value).startswith(f"--policy-arg {pair}: ")


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--policy-arg sinks: given twice$"):
        parse_arguments(["sinks=4", "recent=8", "sinks=8"])


# Policies from TOML files.


def toml(folder: Path, text: str) -> str:
    path = folder / "policy.toml"
    path.write_text(text)
    return str(path)


def test_a_file_names_a_policy_and_its_parameters(tmp_path: Path) -> None:
    path = toml(tmp_path, 'policy = "sink-recent"\nsinks = 64\nrecent = 192\n')
    assert create_policy(path) == SinkRecent(sinks=64, recent=192)


def test_arguments_override_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'policy = "sink-recent"\nsinks = 64\nrecent = 192\n')
    assert create_policy(path, {"recent": "32"}) == SinkRecent(sinks=64, recent=32)


def test_a_file_may_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    toml(tmp_path, 'policy = "full"\n')
    assert create_policy("~/policy.toml") == Full()


@pytest.mark.parametrize("text", ["sinks = 4\n", "policy = 4\n", ""])
def test_a_file_without_a_policy_is_refused(tmp_path: Path, text: str) -> None:
    path = toml(tmp_path, text)
    assert refusal(path) == f'--policy {path}: needs a line `policy = "NAME"`'


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    for path in (missing, toml(tmp_path, "policy = \n")):
        message = refusal(path)
        assert message.startswith(f"--policy {path}: cannot be read (")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("sinks = 0", "--policy-arg sinks=0: must be at least 1"),
        ("sinks = 4.0", "--policy-arg sinks=4.0: expected int"),
        ("sinks = true", "--policy-arg sinks=True: expected int"),
        ("full_ratio = nan", "--policy-arg full_ratio: not a number"),
        ("full_ratio = 1.5", "--policy-arg full_ratio=1.5: must be between"),
        ("window = 4", "--policy-arg window: policy retrieval has no such"),
    ],
)
def test_a_bad_value_in_a_file_is_refused_by_name(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = toml(tmp_path, f'policy = "retrieval"\n{line}\n')
    assert refusal(path).startswith(problem)


def test_none_is_a_value_where_the_parameter_allows_it() -> None:
    assert create_policy("retrieval", {"profile": None}) == create_policy("retrieval")


_ROOT = Path(__file__).parents[3]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_KEY = r"`(\w+)=[^`]*`"


def parameters_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(available_policies()[name])}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_parameter_that_a_page_gives_a_policy_exists(page: Path) -> None:
    names = "|".join(available_policies())
    for name, pairs in re.findall(
        rf"\b({names}):((?:\w+=[^\s,`]+,?)+)", page.read_text()
    ):
        keys = {pair.partition("=")[0] for pair in pairs.rstrip(",").split(",")}
        assert keys <= parameters_of(name) | {"budget"}, f"{name}:{pairs}"
    known = set().union(*map(parameters_of, available_policies()), {"budget"})
    arguments = re.findall(r"--policy-arg (\w+)=", page.read_text())
    assert {key for key in arguments if key != "key"} <= known


def test_a_remark_on_policies_names_parameters_that_each_of_them_has() -> None:
    checked = 0
    for remark in (_ROOT / "docs/policies.md").read_text().split("\n* "):
        head = re.match(r"(?:`[\w-]+`(?:, )?)+", remark)
        names = re.findall(r"`([\w-]+)`", head[0]) if head else []
        for name in {*names} & {*available_policies()}:
            for key in re.findall(_KEY, remark):
                assert key in parameters_of(name), f"{name} has no {key}"
                checked += 1
    assert checked > 4
