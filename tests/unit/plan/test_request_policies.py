# SPDX-License-Identifier: Apache-2.0
"""What a request may name, and that it makes the server read no file of its choice."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.plan import request_policies
from kvserve.plan.dense import DenseRule
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.request_policies import rule_named
from kvserve.plan.rule import MixedRule
from kvserve.plan.streaming import StreamRule
from policies.base import Capabilities, ModelShape, StreamingPolicy, parameter
from policies.budgets import PolicySpec
from policies.full import Full
from policies.moa import MoA
from policies.registry import available_policies, create_policy
from policies.retrieval import Retrieval
from policies.sharded import Sharded
from policies.sink_recent import SinkRecent
from policies.snapkv import SnapKV

KEYS = ["budget", "sinks", "recent", "full_ratio", "length", "stride", "local_blocks"]
KEYS += ["step", "offset", "dense_every", "dense_heads", "block", "insist", "pattern"]
VALUES = [
    "0",
    "1",
    "-1",
    "32",
    "33",
    "64",
    "1000",
    "2048",
    "2049",
    "9223372036854775807",
]
VALUES += [
    "1e3",
    "1e400",
    "nan",
    "inf",
    "true",
    "none",
    "",
    "0.1",
    "1e-300",
    "25%",
    "٣",
]

MODEL = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64, 2048)
ALONE = StreamRule(Full(), MODEL, 32, 2048)
RULE = MixedRule(ALONE, step_tokens=256)


def under(policy: StreamingPolicy, **values: Any) -> MixedRule:
    """The rule of a server that was started with ``policy``."""
    alone = dataclasses.replace(ALONE, policy=policy, **values)
    return dataclasses.replace(RULE, default=alone)


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


class TestGuard:
    def params(self, text: Any, max_tokens: int | None = 1) -> Any:
        return SimpleNamespace(extra_args={"kv_policy": text}, max_tokens=max_tokens)

    def test_who_names_nothing_passes_everywhere(self) -> None:
        from kvserve.engine.start.admission import PolicyGuard

        for rule in (None, RULE, ALONE):
            guard = PolicyGuard(rule, 2048, 1)
            for extra in (None, {}, {"session_id": "a"}):
                params = SimpleNamespace(extra_args=extra, max_tokens=100)
                guard.admit(params, 100)
                assert params.extra_args is extra

    def test_servers_without_the_flag_say_so(self) -> None:
        from kvserve.engine.start.admission import PolicyGuard

        dense = DenseRule(SnapKV(), MODEL, 32, 2048)
        for rule in (dense, ALONE):
            with pytest.raises(UserError, match="without --allow-request-policies"):
                PolicyGuard(rule, 2048, 99999).admit(self.params("full"), 1)
        with pytest.raises(UserError, match="stock vLLM"):
            PolicyGuard(None, 2048, 99999).admit(self.params("full"), 1)

    def test_a_request_that_can_never_fit_is_refused(self) -> None:
        from kvserve.engine.start.admission import PolicyGuard

        guard = PolicyGuard(RULE, 2048, 90 * 20)
        guard.admit(self.params("full", 40), 600)
        guard.admit(self.params("sink-recent:recent=64", 1000), 600)
        with pytest.raises(UserError, match="needs 1890 pages, but the pool has 1800"):
            guard.admit(self.params("full", 41), 600)
        with pytest.raises(UserError, match="of 2048 tokens"):
            guard.admit(self.params("full", None), 600)

    @pytest.mark.parametrize(
        ("text", "settled"),
        [
            ("full", "full"),
            ("sink-recent:recent=64", "sink-recent:recent=64"),
            ("moa:budget=0.25", "moa:budget=0.25"),
            ("full:budget=1", "full:"),
            ("streaming-llm:budget=0.5", "streaming-llm:sinks=32,recent=480"),
            (
                "retrieval:budget=0.5,full_ratio=0.1",
                "retrieval:full_ratio=0.1,sinks=32,recent=352",
            ),
        ],
    )
    def test_nobody_behind_the_guard_needs_lengths(
        self, text: str, settled: str
    ) -> None:
        from kvserve.engine.start.admission import PolicyGuard
        from kvserve.plan.request_policies import rule_of_request

        guard, params = PolicyGuard(RULE, 2048, 99999), self.params(text, 24)
        given = params.extra_args
        for _ in range(2):  # some routes ask twice
            guard.admit(params, 1000)
        assert params.extra_args == {"kv_policy": settled}
        assert given == {"kv_policy": text}
        expected = rule_named(RULE, text, 1024)
        for tokens in (1, 1024, 4096):
            named = rule_of_request(RULE, params, tokens)
            assert named == expected

    @given(
        name=st.sampled_from(sorted(available_policies())),
        values=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)),
        prompt=st.integers(1, 2048),
        reply=st.integers(1, 4096),
        shared=st.booleans(),
    )
    @example("sharded", {"budget": "1000"}, 1000, 24, False)
    def test_what_the_guard_lets_pass_can_be_planned_by_the_engine(
        self, name: str, values: dict[str, str], prompt: int, reply: int, shared: bool
    ) -> None:
        from kvserve.engine.start.admission import PolicyGuard
        from kvserve.plan.request_policies import rule_of_request

        server = under(Full(), in_flight=512 if shared else 0)
        text = f"{name}:" + ",".join(f"{key}={one}" for key, one in values.items())
        params = self.params(text, reply)
        try:
            PolicyGuard(server, 2048, 99999).admit(params, prompt)
        except UserError:
            return
        named = rule_of_request(server, params, prompt + reply)
        assert named is not None
        plan = named.of_request(prompt, reply)
        for tokens in (1, 33, min(prompt + reply, 2048)):
            lanes = plan.lane_tokens(tokens)
            assert 0 < lanes.sum() <= tokens * lanes.size
            assert plan.entries(tokens) >= len(lanes)
            assert plan.pages(tokens) <= server.full.pages(tokens)
            assert plan.most_pages(tokens) <= server.largest.pages(tokens)
            assert plan.entries(tokens) <= server.most_entries(2048)

    @pytest.mark.parametrize(
        ("policy", "said"),
        [(SnapKV(), "when a prompt has been read"), (MoA(), "the length of a reply")],
    )
    def test_beams_would_lose_what_these_policies_do(
        self, policy: Any, said: str
    ) -> None:
        from kvserve.engine.start.admission import PolicyGuard

        is_dense = isinstance(policy, SnapKV)
        rule = DenseRule(policy, MODEL, 32, 2048) if is_dense else under(policy)
        with pytest.raises(UserError, match=said):
            PolicyGuard(rule, 2048, 999).admit_beams()
        for same in (None, under(SinkRecent()), under(Retrieval()), RULE):
            PolicyGuard(same, 2048, 999).admit_beams()

    def test_replies_of_full_attention_say_so(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from vllm import SamplingParams

        from kvserve.engine.start.admission import PolicyGuard
        from kvserve.http.notices import collect, notice

        dense = PolicyGuard(DenseRule(SnapKV(), MODEL, 32, 2048), 2048, 999)
        asked = SamplingParams(max_tokens=9, prompt_logprobs=1)
        said = dense.remark(asked)
        assert said is not None
        assert "log probabilities of the prompt are those of full attention" in said
        assert "one token" in str(dense.remark(SamplingParams(max_tokens=1)))
        assert dense.remark(SamplingParams(max_tokens=9)) is None
        assert PolicyGuard(RULE, 2048, 999).remark(asked) is None
        asked.extra_args = {"kv_policy": "snapkv"}
        assert PolicyGuard(RULE, 2048, 999).remark(asked) == said
        assert PolicyGuard(None, 2048, 999).remark(asked) is None
        found = collect()
        for _ in range(3):
            notice(said)
        assert [*found] == [said]
        assert capsys.readouterr().err == f"kvserve: {said}\n"

    def test_responses_are_checked_before_they_begin(self) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        from kvserve.engine.start.admission import PolicyGuard
        from kvserve.http.request_policies import PARAMETER, guard_requests

        called: list[str] = []
        client = SimpleNamespace(
            model_config=SimpleNamespace(is_encoder_decoder=False),
            generate=lambda *values: called.append(values[-1]),
        )
        responses = SimpleNamespace(
            _generate_with_builtin_tools=lambda **_: called.append("response"),
            create_responses=None,
        )
        state = SimpleNamespace(openai_serving_responses=responses)
        guard_requests(client, state, PolicyGuard(RULE, 2048, 99999))  # type: ignore[arg-type]
        prompt = {"type": "token", "prompt_token_ids": [1, 2]}
        good, bad = (
            SamplingParams(max_tokens=9, extra_args={"kv_policy": text})
            for text in ("full", "empty")
        )
        client.generate(prompt, good, "one")
        responses._generate_with_builtin_tools(
            engine_input=prompt, sampling_params=good, request_id="two"
        )
        assert called == ["one", "response"]
        with pytest.raises(
            VLLMValidationError, match="'empty': is no policy"
        ) as caught:
            client.generate(prompt, bad, "three")
        assert caught.value.parameter == PARAMETER == "vllm_xargs.kv_policy"
        with pytest.raises(VLLMValidationError, match="'empty': is no policy"):
            responses._generate_with_builtin_tools(
                engine_input=prompt, sampling_params=bad, request_id="four"
            )
        assert called == ["one", "response"]
