# SPDX-License-Identifier: Apache-2.0
"""Who names a policy is let in, or told in one line why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kvserve.engine.start.admission import PolicyGuard
from kvserve.errors import UserError
from kvserve.http.notices import collect, notice
from kvserve.http.request_policies import PARAMETER, guard_requests
from kvserve.plan.dense import DenseRule
from kvserve.plan.request_policies import rule_named, rule_of_request
from policies.full import Full
from policies.moa import MoA
from policies.registry import available_policies
from policies.retrieval import Retrieval
from policies.sink_recent import SinkRecent
from policies.snapkv import SnapKV
from tests.unit.served_rules import ALONE, MODEL, RULE, under

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


def params_of(text: Any, max_tokens: int | None = 1) -> Any:
    return SimpleNamespace(extra_args={"kv_policy": text}, max_tokens=max_tokens)


def test_who_names_nothing_passes_everywhere() -> None:
    for rule in (None, RULE, ALONE):
        guard = PolicyGuard(rule, 2048, 1)
        for extra in (None, {}, {"session_id": "a"}):
            params = SimpleNamespace(extra_args=extra, max_tokens=100)
            guard.admit(params, 100)
            assert params.extra_args is extra


def test_servers_without_the_flag_say_so() -> None:
    dense = DenseRule(SnapKV(), MODEL, 32, 2048)
    for rule in (dense, ALONE):
        with pytest.raises(UserError, match="without --allow-request-policies"):
            PolicyGuard(rule, 2048, 99999).admit(params_of("full"), 1)
    with pytest.raises(UserError, match="stock vLLM"):
        PolicyGuard(None, 2048, 99999).admit(params_of("full"), 1)


def test_a_request_that_can_never_fit_is_refused() -> None:
    guard = PolicyGuard(RULE, 2048, 90 * 20)
    guard.admit(params_of("full", 40), 600)
    guard.admit(params_of("sink-recent:recent=64", 1000), 600)
    with pytest.raises(UserError, match="needs 1890 pages, but the pool has 1800"):
        guard.admit(params_of("full", 41), 600)
    with pytest.raises(UserError, match="of 2048 tokens"):
        guard.admit(params_of("full", None), 600)


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
def test_nobody_behind_the_guard_needs_lengths(text: str, settled: str) -> None:
    guard, params = PolicyGuard(RULE, 2048, 99999), params_of(text, 24)
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
    name: str, values: dict[str, str], prompt: int, reply: int, shared: bool
) -> None:
    server = under(Full(), in_flight=512, is_shared=shared)
    text = f"{name}:" + ",".join(f"{key}={one}" for key, one in values.items())
    params = params_of(text, reply)
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
def test_beams_would_lose_what_these_policies_do(policy: Any, said: str) -> None:
    is_dense = isinstance(policy, SnapKV)
    rule = DenseRule(policy, MODEL, 32, 2048) if is_dense else under(policy)
    with pytest.raises(UserError, match=said):
        PolicyGuard(rule, 2048, 999).admit_beams()
    for same in (None, under(SinkRecent()), under(Retrieval()), RULE):
        PolicyGuard(same, 2048, 999).admit_beams()


def test_replies_of_full_attention_say_so(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_responses_are_checked_before_they_begin() -> None:
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
    with pytest.raises(VLLMValidationError, match="'empty': is no policy") as caught:
        client.generate(prompt, bad, "three")
    assert caught.value.parameter == PARAMETER == "vllm_xargs.kv_policy"
    with pytest.raises(VLLMValidationError, match="'empty': is no policy"):
        responses._generate_with_builtin_tools(
            engine_input=prompt, sampling_params=bad, request_id="four"
        )
    assert called == ["one", "response"]
