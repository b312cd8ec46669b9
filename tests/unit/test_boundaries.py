# SPDX-License-Identifier: Apache-2.0
"""The check of walls and floors finds what it is there for."""

from __future__ import annotations

import ast

import pytest

from scripts.check_boundaries import imported, ring, room_of, rooms, violations

TABLE = """
<!-- rooms -->
| room | runs in | may import | libraries |
|---|---|---|---|
| `kvserve` (`cli`) | every process | everything | vllm |
| `kvserve/engine/worker` | the worker | `batch`, `plan` | vllm, torch |
| `kvserve/engine/batch` | the worker | `plan` | |
| `kvserve/plan` | both | | |
| `policies` | every process | | torch |
| ground (`errors`) | anywhere | | |
<!-- /rooms -->
"""
ROOMS = rooms(TABLE)
MODULES = {
    "kvserve.cli",
    "kvserve.engine.worker.worker",
    "kvserve.engine.batch.rows",
    "kvserve.plan.lanes",
    "kvserve.errors",
    "policies.base",
}


@pytest.mark.parametrize(
    ("module", "room"),
    [
        ("kvserve.cli", "kvserve"),
        ("kvserve.engine.batch.rows", "kvserve/engine/batch"),
        ("policies.base", "policies"),
        ("kvserve.errors", "ground"),
    ],
)
def test_a_module_is_in_the_innermost_room(module: str, room: str) -> None:
    assert room_of(module, ROOMS) == room


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("kvserve.engine.worker.worker", {"kvserve.engine.batch.rows", "vllm"}),
        ("kvserve.plan.lanes", {"kvserve.errors", "policies.base", "numpy"}),
        ("kvserve.cli", {"kvserve.engine.worker.worker", "kvserve.plan.lanes"}),
    ],
)
def test_what_the_table_allows_passes(module: str, imports: set[str]) -> None:
    assert violations(module, imports, MODULES, ROOMS) == []


@pytest.mark.parametrize(
    ("module", "imports", "found"),
    [
        ("kvserve.plan.lanes", {"torch"}, ["imports torch; kvserve/plan may not"]),
        (
            "kvserve.plan.lanes",
            {"kvserve.engine.batch.rows"},
            [
                "imports kvserve.engine.batch.rows; kvserve/plan may not import "
                "kvserve/engine/batch",
                "imports kvserve.engine.batch.rows, from a floor above",
            ],
        ),
        (
            "kvserve.errors",
            {"policies.base"},
            ["imports policies.base, from a floor above"],
        ),
    ],
)
def test_what_it_does_not_allow_is_named(
    module: str, imports: set[str], found: list[str]
) -> None:
    assert violations(module, imports, MODULES, ROOMS) == found


def test_imports_inside_functions_count() -> None:
    source = "def f():\n    from kvserve.plan import lanes\n    import torch.nn\n"
    found = set(imported(ast.parse(source), MODULES))
    assert found == {"kvserve.plan.lanes", "torch"}


def test_a_ring_is_found() -> None:
    assert ring({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(ring({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
