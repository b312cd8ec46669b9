# SPDX-License-Identifier: Apache-2.0
"""Windows, chunks and states of the model's own: a request's reply is its own.

Not its neighbours', nor one of how its prompt was cut, of losing its pages, or of who
had read the beginning of its prompt before. What it held is back once it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import check_start
from kvserve.errors import UserError
from tests.engine.conftest import Model
from tests.engine.families import FAMILIES
from tests.engine.harness import MIB, Engine, EngineSlot, random_prompts
from tests.engine.mixed_policies import (
    NAMED,
    SELECTING,
    SERVER,
    sampling,
    start,
)
from tests.reference.families import VOCAB

pytestmark = pytest.mark.engine

LENGTHS = [17, 95, 97, 333, 700]
STEPS = 40
BUDGET = {"sinks": 32, "recent": 64}
LOCAL = ["tiny-window", "tiny-chunk"]
STATES = {one.name: one for one in FAMILIES if one.name in ("falcon-h1", "granite4")}
ASKED: dict[str | None, tuple[str, dict[str, Any]]]
ASKED = {None: SERVER, **dict([*NAMED.items()][:2]), **dict([*SELECTING.items()][1:])}
"""What requests name: nothing, full, another policy of positions, and H2O."""


@pytest.fixture(scope="module")
def state_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("states")
    return {name: family.write(directory) for name, family in STATES.items()}


def slots_held(engine: Engine) -> dict[str, int]:
    """Slots of states, by request; a step tells the worker of who is done."""
    engine.step()
    worker = engine._core.model_executor.driver_worker.worker
    return dict(worker._states.slots_held)


def assert_all_is_back(engine: Engine) -> None:
    assert engine.pages_held == {}
    assert engine.pool.get_num_free_blocks() == engine.pages_for_requests
    assert slots_held(engine) == {}


def progress(engine: Engine) -> list[tuple[int, int]]:
    """Tokens computed and tokens of the prompt of every request that runs."""
    return [
        (request.num_computed_tokens, request.num_prompt_tokens)
        for request in engine.scheduler.running
    ]


@pytest.mark.parametrize("name", [*LOCAL, *STATES])
def test_a_reply_depends_on_neither_chunks_nor_neighbours_nor_preemption(
    engines: EngineSlot,
    models: dict[str, Model],
    state_models: dict[str, Path],
    name: str,
) -> None:
    path = state_models[name] if name in STATES else models[name].path
    options = STATES[name].engine_options if name in STATES else {}
    prompts = random_prompts(LENGTHS, VOCAB, seed=3)
    asked: tuple[Any, ...] = path, "sink-recent", BUDGET
    engine = engines.start(*asked, max_num_batched_tokens=1024, **options)
    expected = [engine.generate([prompt], STEPS)[0].tokens for prompt in prompts]
    together = engine.generate(prompts[::-1], STEPS)[::-1]
    assert [reply.tokens for reply in together] == expected
    assert_all_is_back(engine)
    for chunk in (64, 200):
        engine = engines.start(*asked, max_num_batched_tokens=chunk, **options)
        names = [engine.add(prompt, STEPS) for prompt in prompts]
        leaving = [engine.add(prompt[::-1], STEPS) for prompt in prompts[2:]]
        cut = {"prompt": False, "reply": False}
        for steps in (4, 14):
            for _ in range(steps):
                engine.step()
            found = progress(engine)
            cut["prompt"] |= any(0 < done < prompt for done, prompt in found)
            cut["reply"] |= any(done > prompt + 5 for done, prompt in found)
            engine.preempt_all()
            engine.step()
            engine.abort(leaving.pop())
        engine.finish()
        assert all(cut.values())
        replies = [engine.replies.pop(name) for name in names]
        assert [reply.tokens for reply in replies] == expected
        assert any(reply.preemptions for reply in replies)
        assert_all_is_back(engine)


@pytest.mark.parametrize("name", LOCAL)
def test_what_begins_alike_is_read_once(
    engines: EngineSlot, models: dict[str, Model], name: str
) -> None:
    """Less than a window or chunk, more than one, and chunks cut at every block."""
    model, steps = models[name], 20
    stem, *ends = random_prompts([320, 5, 40, 90], model.vocab, seed=2)
    common = [64, 96, 128, 320]
    prompts = [stem[:tokens] + end for tokens in common for end in ends]
    replies = []
    for sharing in (False, True):
        engine = engines.start(
            model.path,
            "sink-recent",
            BUDGET,
            max_num_batched_tokens=200,
            enable_prefix_caching=sharing,
        )
        found = []
        for place, prompt in enumerate(prompts):
            if place % len(ends) == 0 and sharing:
                assert engine.scheduler.reset_prefix_cache()
            found += engine.generate([prompt], steps)
        replies.append(found)
        assert_all_is_back(engine)
    plain, shared = replies
    assert [reply.tokens for reply in shared] == [reply.tokens for reply in plain]
    hits = [reply.cached for reply in shared]
    assert hits == [tokens * bool(n) for tokens in common for n in range(len(ends))]


@pytest.mark.parametrize("name", STATES)
def test_prefixes_of_states_are_not_shared(
    engines: EngineSlot, state_models: dict[str, Path], name: str
) -> None:
    with refused("--enable-prefix-caching: ", "keeps states") as found:
        engines.start(
            state_models[name],
            "full",
            enable_prefix_caching=True,
            **STATES[name].engine_options,
        )
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["granite4", "gemma4-unequal"])
def test_models_that_cannot_share_are_served_without_and_told_so(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (family,) = (one for one in FAMILIES if one.name == name)
    options = engine_options(
        PolicySettings("full"),
        {
            "model": str(family.write(tmp_path)),
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            **family.engine_options,
        },
    )
    config = check_start(options)
    assert options["enable_prefix_caching"] is False
    assert not config.cache_config.enable_prefix_caching
    assert "kvserve: prefix caching is off: " in capfd.readouterr().err


@pytest.mark.parametrize("name", STATES)
def test_a_pool_too_small_for_states_is_refused(
    engines: EngineSlot, state_models: dict[str, Path], name: str
) -> None:
    asked: Any = (state_models[name], "full")
    options: dict[str, Any] = {
        "max_model_len": 256,
        "kv_cache_memory_bytes": 2 * MIB,
        **STATES[name].engine_options,
    }
    with refused("--kv-cache-memory-bytes=", "lower --max-num-seqs") as found:
        engines.start(*asked, max_num_seqs=64, **options)
    assert "\n" not in str(found.value)
    # As it says, fewer requests do fit.
    engine = engines.start(*asked, max_num_seqs=1, **options)
    (reply,) = engine.generate(random_prompts([200], VOCAB, seed=1), 4)
    assert len(reply.tokens) == 4


def refused(begins: str, mentions: str) -> Any:
    return pytest.raises(UserError, match=f"(?s)^{begins}.*{mentions}")


def test_requests_of_many_policies_share_an_engine(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-window"]
    prompts = random_prompts([70, 333, 610], model.vocab, seed=21)
    expected = []
    for policy, values in ASKED.values():
        arguments = model.policy_args(policy, **values)
        engine = engines.start(model.path, policy, arguments)
        expected += [reply.tokens for reply in engine.generate(prompts, STEPS)]
    assert len({*map(tuple, expected)}) > len(expected) // 2
    engine = start(engines, model, 100)
    names = [
        engine.add(prompt, STEPS, **sampling(text))
        for text in ASKED
        for prompt in prompts
    ]
    engine.finish()
    assert [engine.replies.pop(name).tokens for name in names] == expected
    assert_all_is_back(engine)


def test_a_request_may_not_select_where_there_are_chunks(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    engine = engines.start(
        models["tiny-chunk"].path, "full", {}, allow_request_policies=True
    )
    with pytest.raises(UserError, match="a chunk of 96 tokens") as found:
        engine.add([*range(8, 200)], 4, **sampling("snapkv:capacity=64,window=16"))
    assert "\n" not in str(found.value)
    (reply,) = engine.generate(random_prompts([200], VOCAB, seed=1), 4)
    assert len(reply.tokens) == 4
