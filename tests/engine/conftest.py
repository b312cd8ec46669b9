# SPDX-License-Identifier: Apache-2.0
"""The running engine, and models for it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from policies.base import FULL, HeadBudget, ModelShape, StreamingPolicy
from policies.history import HISTORY_FORMAT
from policies.registry import create_policy
from tests.engine.harness import PAGE, EngineSlot, write_profile
from tests.reference.models import (
    ALIBI,
    CAP,
    CHUNK,
    GQA,
    LATENT,
    LONG,
    MHA,
    MIXED,
    MQA,
    SINKS,
    WINDOW,
    TinyLlama,
)
from tests.reference.thinning import JUDGES

SCORING = (SINKS, CAP, ALIBI, CHUNK, MIXED)
"""Their scores are not only products, or their layers see chunks."""


@dataclass(frozen=True)
class Model:
    """A model to serve; a retrieval profile, MoA plans and a history profile for it.

    Spans of ``plan`` are an eighth to a half, those of ``wide_plan`` are everything.
    """

    path: Path
    shape: ModelShape
    vocab: int
    profile: Path
    plan: Path
    wide_plan: Path
    history: Path

    def policy_args(self, policy: str, **values: Any) -> dict[str, Any]:
        """Arguments of ``policy``, with the profile if it reads one."""
        if policy == "retrieval":
            return {"profile": str(self.profile), **values}
        if policy in JUDGES:
            return {"profile": str(self.history), **values}
        if policy == "moa":
            plan = self.wide_plan if values.pop("wide", False) else self.plan
            return {"plan": str(plan), **values}
        if policy == "sharded":
            return {"block": PAGE, "insist": True, **values}
        return values

    def budgets(
        self, policy: str, policy_args: dict[str, Any], tokens: int = 1 << 20
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        """What heads keep of a request that may become ``tokens`` tokens long."""
        found = create_policy(policy, policy_args)
        assert isinstance(found, StreamingPolicy)
        tokens = tokens if found.capabilities.elastic else 1 << 20
        shape, budgets = self.shape, iter(found.budgets(self.shape.open, tokens))
        nothing_to_say = (FULL,) * shape.num_kv_heads
        return tuple(
            nothing_to_say if one else next(budgets) for one in shape.local_by_layer
        )


@pytest.fixture(scope="session")
def engines() -> Iterator[EngineSlot]:
    slot = EngineSlot()
    yield slot
    slot.close()


@pytest.fixture(autouse=True)
def _sound_books(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check the engine's books after every test that had one."""
    yield
    if "engines" in request.fixturenames:
        slot: EngineSlot = request.getfixturevalue("engines")
        slot.check_books()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Random models by name, and the embedded one."""
    from tests.reference.score_llama import register

    register()
    directory = tmp_path_factory.mktemp("models")
    tiny = (MHA, GQA, MQA, LATENT, LONG, WINDOW, *SCORING)
    found = {one.name: tiny_model(one, directory) for one in tiny}
    return found | {"smollm2": _embedded(directory)}


def tiny_model(tiny: TinyLlama, directory: Path) -> Model:
    """Write a model, its profile and its plans below ``directory``."""
    shape = ModelShape(
        tiny.name,
        tiny.num_layers,
        tiny.num_query_heads,
        tiny.num_kv_heads,
        tiny.head_size,
        local=tiny.local,
    )
    path = tiny.write(directory)
    profile = _profile(directory, shape)
    history = _history(directory, shape)
    plans = _plans(directory, shape)
    return Model(path, shape, tiny.vocab_size, profile, *plans, history)


def _embedded(directory: Path) -> Model:
    from kvserve.models import embedded_model

    path = embedded_model()
    shape = ModelShape(path.name, 30, 9, 3, 64)
    shipped = files("policies") / "profiles" / path.name / "retrieval.json"
    plans, history = _plans(directory, shape), _history(directory, shape)
    return Model(path, shape, 49152, Path(str(shipped)), *plans, history)


def _history(directory: Path, shape: ModelShape) -> Path:
    """Write shares of history that differ in every head, some of which need none."""
    rng = random.Random(shape.name)
    layers, heads = range(shape.num_layers), range(shape.num_kv_heads)
    needs = [[max(rng.uniform(-0.2, 1), 0) for _ in heads] for _ in layers]
    shares = [[[level * one for one in row] for row in needs] for level in (0.3, 0.6)]
    path = directory / f"{shape.name}-history.json"
    path.write_text(json.dumps({"format": HISTORY_FORMAT, "shares": shares}))
    return path


def _plans(directory: Path, shape: ModelShape) -> tuple[Path, Path]:
    """Write spans that differ in every head of a layer, and spans of everything."""
    layers, heads = range(shape.num_layers), range(shape.num_query_heads)
    mixed = [[(1 + (layer + head) % 4) / 8 for head in heads] for layer in layers]
    narrow, wide = (directory / f"{shape.name}-{kind}.json" for kind in ("moa", "wide"))
    for path, betas in ((narrow, mixed), (wide, [[1] * len(heads)] * len(layers))):
        alphas = [[0] * len(heads)] * len(layers)
        path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return narrow, wide


def _profile(directory: Path, shape: ModelShape) -> Path:
    return write_profile(
        directory / f"{shape.name}.json", shape.num_layers, shape.num_kv_heads
    )
