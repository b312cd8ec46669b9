# SPDX-License-Identifier: Apache-2.0
"""What a request may name, and that it makes the server read no file of its choice."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvserve.errors import UserError
from kvserve.plan import request_policies
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.request_policies import rule_named
from kvserve.plan.streaming import StreamRule
from policies.base import Capabilities, StreamingPolicy, parameter
from policies.budgets import PolicySpec
from policies.full import Full
from policies.moa import MoA
from policies.registry import available_policies, create_policy
from policies.retrieval import Retrieval
from policies.sharded import Sharded
from policies.sink_recent import SinkRecent
from tests.unit.served_rules import MODEL, RULE, under


def plan_of(policy: StreamingPolicy, tokens: int = 2048) -> PagePlan:
    """The plan of a server of one policy."""
    return StreamRule(policy, MODEL, 32, 2048).plan(tokens)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        ("full:", Full()),
        ("sink-recent", SinkRecent()),
        ("streaming-llm:sinks=64,recent=128", SinkRecent(64, 128)),
        ("retrieval", Retrieval()),
        ("retrieval:full_ratio=0.1", Retrieval(full_ratio=0.1)),
        ("moa:budget=0.25", MoA(budget=0.25)),
        ("moa:budget=25%", MoA(budget=0.25)),
        ("moa:budget=0.45", MoA(length=1536)),
        ("moa:length=512", MoA(length=512)),
        ("sink-recent:budget=512", SinkRecent(32, 480)),
        ("sink-recent:budget=25%", SinkRecent(32, 480)),
    ],
)
def test_a_request_gets_the_plan_of_a_server_of_that_policy(
    text: str, policy: StreamingPolicy
) -> None:
    named = rule_named(RULE, text, 2048)
    assert named.policy == policy
    assert named.of_request(1000, 1048) == plan_of(policy)
    assert named.of_request(100, 200) == plan_of(policy, 300)


def test_a_budget_is_of_what_the_request_may_reach() -> None:
    for tokens in (512, 1024, 2048, 4096):
        named = rule_named(RULE, "sink-recent:budget=0.5", tokens)
        within = min(tokens, 2048)
        assert named.policy == SinkRecent(32, within // 2 - 32)
    spec = PolicySpec.parse("retrieval:budget=0.3")
    expected = create_policy("retrieval", spec.arguments(1024, MODEL))
    assert rule_named(RULE, "retrieval:budget=0.3", 1024).policy == expected


def test_what_a_request_cannot_set_is_the_servers(tmp_path: Path) -> None:
    profile = tmp_path / "retrieval.json"
    scores = [[float(layer == 0)] * 3 for layer in range(30)]
    content = {"format": "kvserve-retrieval/1", "kv_head_scores": scores}
    profile.write_text(json.dumps(content))
    server = Retrieval(str(profile), full_ratio=0.5, recent=64)
    named = rule_named(under(server), "retrieval:full_ratio=0.1", 2048)
    # Numbers mean the same on every server: their defaults are the policy's.
    assert named.policy == Retrieval(str(profile), full_ratio=0.1)
    assert rule_named(under(Full()), "retrieval", 2048).policy == Retrieval()
    budget = rule_named(under(server), "retrieval:budget=0.5", 2048).policy
    assert isinstance(budget, Retrieval)
    assert budget.profile == str(profile)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a text NAME"),
        ("f" * 201, "at most 200 characters"),
        (None, "expected a text NAME"),
        (["full"], "expected a text NAME"),
        (0.25, "expected a text NAME"),
        ("nothing", "'nothing': is no policy; name one of full"),
        ("none", "is no policy"),
        ("Full", "is no policy"),
        ("mine.toml", "is no policy"),
        ("snapkv:window=300", "last 300 tokens .* have room for 256"),
        ("full:sinks=3", "sinks: policy full has no such argument"),
        ("sink-recent:sinks", "sinks: expected key=value"),
        ("sink-recent:sinks=1,sinks=2", "sinks: given twice"),
        ("sink-recent:recent=0", r"^recent=0: must be at least 1"),
        ("sink-recent:recent=many", "recent=many: expected int"),
        ("retrieval:full_ratio=nan", "not a number"),
        ("retrieval:full_ratio=2", "must be between 0.0 and 1.0"),
        ("full:budget=0.5", "keeps everything and takes no budget"),
        ("sink-recent:budget=2.5", "budget=2.5: give a share"),
        ("sink-recent:budget=0.01", "less than the 64 tokens"),
        ("moa:budget=0.1", "budget=0.1: .* has plans for 0.25, 0.5"),
        ("moa:length=4096", "length=4096"),
        ("sharded:insist=true", "thinks in blocks of 64 tokens, but pages .* hold 32"),
        ("sharded:block=32,insist=true", "turns of 8 pages"),
        ("sharded:block=32", r"pass `insist=true` .* or choose `retrieval`"),
        ("sharded:budget=5e-324", "cannot be planned"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(
    text: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rule_named(RULE, text, 2048)
    assert "\n" not in str(caught.value)
    assert "--policy-arg" not in str(caught.value)


def test_a_model_without_a_profile_says_that_the_server_needs_one() -> None:
    other = under(Full(), model=dataclasses.replace(MODEL, name="other"))
    for text in ("retrieval", "moa"):
        with pytest.raises(UserError, match="a request cannot name a file"):
            rule_named(other, text, 2048)


def test_ranks_want_heads_that_need_not_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capabilities = dataclasses.replace(
        SinkRecent.capabilities, tensor_parallel_exact=False
    )
    monkeypatch.setattr(SinkRecent, "capabilities", capabilities)
    request_policies._under.cache_clear()
    assert rule_named(RULE, "sink-recent", 2048)
    with pytest.raises(UserError, match="lie on 3 ranks"):
        rule_named(under(Full(), ranks=3), "sink-recent", 2048)
    request_policies._under.cache_clear()


class Opened(Exception):  # noqa: N818
    """Somebody opened a file."""


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody open a file, nor ask whether there is one."""
    available_policies()

    def refuse(*args: Any, **_: Any) -> Any:
        raise Opened(args)

    for module, name in (
        (builtins, "open"),
        (io, "open"),
        (os, "open"),
        (os, "stat"),
        (Path, "open"),
        (Path, "read_text"),
        (Path, "exists"),
        (Path, "is_file"),
        (Path, "expanduser"),
    ):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize("path", ["/etc/passwd", "~/x", "../x", "x.toml", "", "None"])
@pytest.mark.parametrize("key", ["profile", "plan", "pattern"])
def test_no_parameter_of_a_request_names_a_file(key: str, path: str) -> None:
    owner = {"profile": "retrieval", "plan": "moa", "pattern": "sharded"}[key]
    for server in (Full(), Retrieval("server.json"), MoA("server.json")):
        with pytest.raises(UserError, match=f"{key}: a request sets numbers"):
            rule_named(under(server), f"{owner}:{key}={path}", 2048)


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "/tmp/x.toml", "~/x.toml", "../x.toml", ".toml", "a/b"]
)
def test_no_name_of_a_policy_is_a_file(name: str) -> None:
    for text in (name, f"{name}:recent=480", f"{name}:policy=full"):
        with pytest.raises(UserError, match="is no policy"):
            rule_named(RULE, text, 2048)


@pytest.mark.usefixtures("no_files")
def test_policies_without_files_open_none() -> None:
    for text in ("full", "sink-recent:recent=99", "sink-recent:budget=0.7"):
        assert rule_named(RULE, text, 2048)


@dataclasses.dataclass(frozen=True)
class Foreign(StreamingPolicy):
    """A policy of another package, whose parameters are of many kinds."""

    name: ClassVar[str] = "foreign"
    paper: ClassVar[str] = "none"
    capabilities: ClassVar[Capabilities] = Capabilities("streaming", True)

    where: Path | None = None
    mode: str = parameter("a", "a choice")
    many: tuple[int, ...] = parameter((), "numbers")
    recent: int | None = parameter(None, "tokens")
    share: float = parameter(0.5, "a share")
    switch: bool = parameter(False, "a switch")

    budgets = SinkRecent.budgets


def test_only_numbers_and_switches_of_other_packages_can_be_set() -> None:
    hints = request_policies._hints(Foreign)
    settable = {
        name for name, hint in hints.items() if request_policies._is_number(hint)
    }
    assert settable == {"recent", "share", "switch"}


def test_what_was_read_once_is_not_read_again() -> None:
    first = rule_named(RULE, "sink-recent:recent=96", 100)
    assert rule_named(RULE, "sink-recent:recent=96", 2000) is first
    for cache in (request_policies._parse, request_policies._under):
        size = cache.cache_info().maxsize
        assert size is not None
        assert size <= 256


@pytest.mark.parametrize("server", [SinkRecent(32, 64), Retrieval(), MoA()])
def test_the_largest_plan_is_that_of_full(server: StreamingPolicy) -> None:
    rule = under(server)
    assert rule.is_elastic
    assert rule.has_bounded_lanes
    assert rule.largest.pages(2048) == 64 * 90
    for text in ("full", "sink-recent", "retrieval", "moa:budget=0.25"):
        plan = rule_named(rule, text, 2048).of_request(1000, 1048)
        for tokens in (1, 32, 33, 777, 2048):
            assert plan.pages(tokens) <= rule.largest.pages(tokens)
    assert rule.plan(2048) == plan_of(server)


def test_under_shards_every_plan_is_in_the_servers_turns() -> None:
    server = under(Sharded(block=32, stride=4, local_blocks=2, insist=True))
    assert server.plan(2048).stride == server.largest.stride == 4
    assert server.largest.pages(2048) == 64 * 90
    for text, policy in (
        ("full", Full()),
        ("sink-recent:recent=96", SinkRecent(recent=96)),
        ("moa", MoA()),
    ):
        plan = rule_named(server, text, 2048).of_request(1000, 1048)
        single = plan_of(policy)
        assert plan.stride == 4
        for tokens in (1, 32, 33, 64, 500, 777, 2048):
            assert plan.pages(tokens) == single.pages(tokens)
            assert (plan.lane_tokens(tokens) == single.lane_tokens(tokens)).all()
