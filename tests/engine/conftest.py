# SPDX-License-Identifier: Apache-2.0
"""The running engine, and models for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from policies.base import HeadBudget, ModelShape
from policies.registry import create_policy
from tests.engine.harness import EngineSlot, write_profile
from tests.reference.models import GQA, LONG, MHA, TinyLlama


@dataclass(frozen=True)
class Model:
    """A model to serve, a retrieval profile and a MoA plan for it."""

    path: Path
    shape: ModelShape
    vocab: int
    profile: Path
    plan: Path

    def policy_args(self, policy: str, **values: Any) -> dict[str, Any]:
        """Arguments of ``policy``, with the profile if it reads one."""
        if policy == "retrieval":
            return {"profile": str(self.profile), **values}
        if policy == "moa":
            return {"plan": str(self.plan), **values}
        return values

    def budgets(
        self, policy: str, policy_args: dict[str, Any]
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        return create_policy(policy, policy_args).budgets(self.shape)


@pytest.fixture(scope="session")
def engines() -> Iterator[EngineSlot]:
    slot = EngineSlot()
    yield slot
    slot.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Random models by name, and the embedded one."""
    directory = tmp_path_factory.mktemp("models")
    found = {tiny.name: _tiny(tiny, directory) for tiny in (MHA, GQA, LONG)}
    return found | {"smollm2": _embedded(directory)}


def _tiny(tiny: TinyLlama, directory: Path) -> Model:
    shape = ModelShape(
        tiny.name,
        tiny.num_layers,
        tiny.num_query_heads,
        tiny.num_kv_heads,
        tiny.head_size,
    )
    path = tiny.write(directory)
    profile = _profile(directory, shape)
    return Model(path, shape, tiny.vocab_size, profile, _plan(directory, shape))


def _embedded(directory: Path) -> Model:
    from kvserve.models import embedded_model

    path = embedded_model()
    shape = ModelShape(path.name, 30, 9, 3, 64)
    shipped = files("policies") / "profiles" / path.name / "retrieval.json"
    return Model(path, shape, 49152, Path(str(shipped)), _plan(directory, shape))


def _plan(directory: Path, shape: ModelShape) -> Path:
    """Write spans of an eighth to a half, different in every head of a layer."""
    heads = shape.num_query_heads
    betas = [
        [(1 + (layer + head) % 4) / 8 for head in range(heads)]
        for layer in range(shape.num_layers)
    ]
    path = directory / f"{shape.name}-moa.json"
    path.write_text(
        json.dumps({"alphas": [[0] * heads] * shape.num_layers, "betas": betas})
    )
    return path


def _profile(directory: Path, shape: ModelShape) -> Path:
    return write_profile(
        directory / f"{shape.name}.json", shape.num_layers, shape.num_kv_heads
    )
