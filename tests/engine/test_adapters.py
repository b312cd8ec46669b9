# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters under every family of policies, against models they are merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_identity import assert_identical
from tests.reference.adapters import merge_adapter, write_adapter

pytestmark = pytest.mark.engine

STEPS = 24
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"sinks": 32, "recent": 96},
    "keydiff": {"budget": "75%"},
    "h2o": {"heavy_ratio": 0.2, "recent_ratio": 0.2},
}
SHARING = ("full", "sink-recent", "keydiff")


@pytest.fixture(scope="module")
def adapters(
    models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[Path]]:
    """Two adapters, and the two models that they make."""
    model, folder = models["tiny-gqa"].path, tmp_path_factory.mktemp("adapters")
    found = [write_adapter(model, folder / f"adapter{n}", n) for n in (1, 2)]
    merged = [
        merge_adapter(model, one, folder / f"merged{n}")
        for n, one in enumerate(found, 1)
    ]
    return found, merged


def ask(engine: Engine, prompt: list[int], adapter: Path | None) -> Reply:
    name = engine.add(prompt, STEPS, adapter=adapter)
    engine.finish()
    return engine.replies.pop(name)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapter_replies_as_the_model_that_it_is_merged_into(
    engines: EngineSlot,
    models: dict[str, Model],
    adapters: tuple[list[Path], list[Path]],
    policy: str,
) -> None:
    """Beside requests of another adapter and of none, which share its prefix's text."""
    model, (own, merged) = models["tiny-gqa"], adapters
    arguments = model.policy_args(policy, **POLICIES[policy])
    options = {"enable_prefix_caching": policy in SHARING}
    stem, *ends = random_prompts([300, 5, 40], model.vocab, seed=3)
    prompts = [stem + end for end in ends]
    expected = {}
    for adapter, path in zip([None, *own], [model.path, *merged], strict=True):
        engine = engines.start(path, policy, arguments, **options)
        expected[adapter] = engine.generate(prompts, STEPS)
    tokens = [[one.tokens for one in replies] for replies in expected.values()]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    engine = engines.start(
        model.path, policy, arguments, enable_lora=True, max_loras=2, **options
    )
    names = {
        engine.add(prompt, STEPS, adapter=adapter): expected[adapter][place]
        for place, prompt in enumerate(prompts)
        for adapter in expected
    }
    engine.finish()
    found = [engine.replies.pop(name) for name in names]
    assert_identical(found, [*names.values()])
    assert engine.pages_held == {}


@pytest.mark.parametrize("policy", SHARING)
def test_adapters_share_prefixes_with_nobody_else(
    engines: EngineSlot,
    models: dict[str, Model],
    adapters: tuple[list[Path], list[Path]],
    policy: str,
) -> None:
    model, (own, _) = models["tiny-gqa"], adapters
    engine = engines.start(
        model.path,
        policy,
        model.policy_args(policy, **POLICIES[policy]),
        enable_lora=True,
        max_loras=2,
        enable_prefix_caching=True,
    )
    assert engine.scheduler.reset_prefix_cache()
    (prompt,) = random_prompts([300], model.vocab, seed=4)
    first = [ask(engine, prompt, adapter) for adapter in (None, *own)]
    again = [ask(engine, prompt, adapter) for adapter in (None, *own)]
    assert [one.cached for one in first] == [0, 0, 0]
    assert [one.cached for one in again] == [288, 288, 288]
    assert_identical(again, first)
