# SPDX-License-Identifier: Apache-2.0
"""A tiny model to measure, a cache for each test, and Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.tiny_llama import save_tiny_llama


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that reads bytes."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a test measures is not there for the next."""
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def interrupted(
    module: ModuleType, name: str, calls: list[Any], after: int
) -> Iterator[None]:
    """Have Ctrl-C come at a call of a function, and expect to be told.

    Args:
        name: of the function in ``module``, which notes its calls in ``calls``.
        after: so many calls come to their end.
    """
    counting = getattr(module, name)

    def call(*arguments: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        return counting(*arguments)

    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        with pytest.raises(KeyboardInterrupt):
            yield
