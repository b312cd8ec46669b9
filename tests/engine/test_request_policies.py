# SPDX-License-Identifier: Apache-2.0
"""Requests that name policies of their own share an engine and notice nothing."""

from __future__ import annotations

from typing import Any

import pytest

from kvserve.errors import UserError
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.mixed_policies import (
    KINDS,
    LENGTHS,
    SELECTING,
    STEPS,
    mixture,
    sampling,
    start,
)
from tests.engine.test_isolation import assert_same

pytestmark = pytest.mark.engine

SHAREABLE = [text for text in KINDS if text not in SELECTING]


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny-gqa"]


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return random_prompts(LENGTHS, model.vocab, seed=21)


@pytest.fixture(scope="module")
def alone(
    engines: EngineSlot, model: Model, prompts: list[list[int]]
) -> dict[str | None, list[Reply]]:
    """Every prompt under every policy, on a server of that policy alone."""
    replies = {}
    for text, (policy, arguments) in KINDS.items():
        engine = engines.start(
            model.path, policy, model.policy_args(policy, **arguments)
        )
        replies[text] = engine.generate(prompts, STEPS)
    return replies


def answers(
    engine: Engine, prompts: list[list[int]], pairs: list[tuple[int, str | None]]
) -> list[Reply]:
    """Ask for all pairs of a prompt's place and a policy at once."""
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    engine.finish()
    return [engine.replies.pop(name) for name in names]


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_mixed_policies_answer_as_servers_of_one_policy_do(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
    chunk: int,
) -> None:
    engine = start(engines, model, chunk)
    pairs = mixture(chunk)
    found = answers(engine, prompts, pairs)
    assert_same(found, [alone[text][i] for i, text in pairs])


def test_cached_prefixes_are_those_of_the_same_policy(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    engine = start(engines, model, 100, enable_prefix_caching=True)
    pairs = mixture(3, SHAREABLE)
    expected = [alone[text][i] for i, text in pairs]
    for is_cached in (False, True):
        found = answers(engine, prompts, pairs)
        assert_same(found, expected)
        for (place, _), reply in zip(pairs, found, strict=True):
            assert (reply.cached > 0) == (is_cached and LENGTHS[place] > PAGE)
    with pytest.raises(UserError, match="snapkv: keeps of a prefix what the text"):
        engine.add([5, 6, 7], 4, **sampling("snapkv"))


def test_the_policies_of_this_test_answer_differently(
    alone: dict[str | None, list[Reply]],
) -> None:
    answers = {text: [reply.tokens for reply in alone[text]] for text in alone}
    assert len({str(answer) for answer in answers.values()}) == len(KINDS)


def test_preempted_requests_keep_their_policies(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    # Barely more than one full request of the longest length, and scratch.
    engine = start(engines, model, chunk=128, kv_cache_memory_bytes=4 * MIB)
    pairs = mixture(1)
    found = answers(engine, prompts, pairs)
    assert sum(reply.preemptions for reply in found) > 3
    assert_same(found, [alone[text][i] for i, text in pairs])


THINNING = {"budget": 0.5, "recent": 64, "group": 64, "length": 700}


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "sharing"])
def test_a_server_that_thins_lets_requests_name_others(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
    shared: bool,
) -> None:
    arguments = model.policy_args("keydiff", **THINNING)
    own = engines.start(model.path, "keydiff", arguments).generate(prompts, STEPS)
    more = {**arguments, "budget": 0.8, "group": 128}
    more_own = engines.start(model.path, "keydiff", more).generate(prompts, STEPS)
    named = "keydiff:budget=0.8,group=128,recent=64,length=700"
    kinds = SHAREABLE if shared else KINDS
    # The profile of `retrieval` is of a server that was started with it.
    texts = [None, named, *(one for one in kinds if one and "retrieval" not in one)]
    expected = {**alone, None: own, named: more_own}
    engine = engines.start(
        model.path,
        "keydiff",
        arguments,
        allow_request_policies=True,
        max_num_batched_tokens=150,
        enable_prefix_caching=shared,
    )
    for _ in range(2):
        pairs = mixture(7, texts)
        found = answers(engine, prompts, pairs)
        assert_same(found, [expected[text][i] for i, text in pairs])
    assert not any(engine.pages_held.values())
    with pytest.raises(UserError, match="knorm: judges tokens as this server has not"):
        engine.add([5, 6, 7], 4, **sampling("knorm"))


def test_preempting_everybody_at_once_changes_nothing(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
) -> None:
    engine = start(engines, model)
    pairs = [(place, text) for place in (3, 8) for text in KINDS]
    names = [engine.add(prompts[i], STEPS, **sampling(text)) for i, text in pairs]
    for steps in (3, 9, 15):
        for _ in range(steps):
            engine.step()
        engine.preempt_all()
    engine.finish()
    assert_same(
        [engine.replies.pop(name) for name in names],
        [alone[text][i] for i, text in pairs],
    )


@pytest.mark.parametrize(
    "server",
    [
        "full",
        pytest.param("moa", marks=pytest.mark.slow),
        pytest.param("sharded", marks=pytest.mark.slow),
        "h2o",
    ],
)
def test_servers_of_other_policies_mix_them_too(
    engines: EngineSlot,
    model: Model,
    prompts: list[list[int]],
    alone: dict[str | None, list[Reply]],
    server: str,
) -> None:
    values = {"local_blocks": 2, "stride": 4} if server == "sharded" else {}
    arguments = model.policy_args(server, **values)
    own = engines.start(model.path, server, arguments).generate(prompts, STEPS)
    engine = engines.start(model.path, server, arguments, allow_request_policies=True)
    # Of its own class a request gets the server's file, and the parameters it names.
    same = {
        "moa": "moa:length=1024",
        "sharded": None,
        "full": "full:budget=1",
        "h2o": "h2o:heavy=64,recent=64",
    }[server]
    texts = [None, "full", "streaming-llm:recent=160", "snapkv:capacity=64,window=16"]
    texts.append(same)
    pairs = [(place, text) for place in range(len(LENGTHS)) for text in texts]
    for reply, (i, text) in zip(answers(engine, prompts, pairs), pairs, strict=True):
        if text is None or (server == "full" and text == same):
            assert_same([reply], [own[i]])
        elif text in alone:
            assert_same([reply], [alone[text][i]])
    with pytest.raises(UserError, match="turns of 8 pages"):
        engine.add(
            [1], 1, **sampling("sharded:block=32,insist=true,stride=8,local_blocks=2")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "'nothing': is no policy; name one of full"),
        ("snapkv:window=0", "window=0: must be between 1 and 512"),
        ("retrieval:profile=/etc/passwd", "profile: a request sets numbers"),
        ("sink-recent:recent=0", "recent=0: must be at least 1"),
        ("sink-recent:budget=0.01", "less than the 64 tokens"),
        (7, "expected a text NAME"),
    ],
)
def test_an_unusable_policy_is_refused_before_the_engine_sees_it(
    engines: EngineSlot, model: Model, text: str, message: str
) -> None:
    engine = start(engines, model)
    with pytest.raises(UserError, match=message):
        engine.add([5, 6, 7], 4, **sampling(text))
    assert not engine.is_busy
    assert not engine.scheduler.requests


def test_without_the_flag_a_named_policy_is_refused(
    engines: EngineSlot, model: Model
) -> None:
    engine = engines.start(model.path, "full")
    with pytest.raises(UserError, match="without --allow-request-policies"):
        engine.add([5, 6, 7], 4, **sampling("full"))
    stock = engines.start(model.path, None)
    with pytest.raises(UserError, match="stock vLLM"):
        stock.add([5, 6, 7], 4, **sampling("full"))


def test_what_cannot_be_mixed_is_refused_at_start(model: Model) -> None:
    from kvserve import LLM

    cases: list[tuple[str | None, dict[str, Any], str]] = [
        (None, {}, "--allow-request-policies: --policy none"),
        ("full", {"scheduler_cls": "a.B"}, "--scheduler-cls=a.B: --allow-request"),
        (
            "sink-recent",
            {"max_model_len": 4096, "kv_cache_memory_bytes": 4 * MIB},
            "needs .* under `full`, which --allow-request-policies lets it name",
        ),
    ]
    for policy, options, message in cases:
        with pytest.raises(UserError, match=message):
            LLM(str(model.path), policy=policy, allow_request_policies=True, **options)
