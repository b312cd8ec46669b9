# SPDX-License-Identifier: Apache-2.0
"""vLLM's inside is as ``kvserve.engine.border`` says: an upgrade shows here first."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvserve.engine.border import BORDER, REPLACED, Relied

ROOT = Path(__file__).parents[3] / "kvserve"
INSIDE = ("vllm.v1.", "vllm.model_executor.")


def find(symbol: str) -> Any:
    """A module, or what a module has.

    Raises:
        LookupError: neither is there.
    """
    try:
        return importlib.import_module(symbol)
    except ImportError:
        pass
    module, _, name = symbol.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise LookupError(symbol) from None


def faults(one: Relied) -> Iterator[str]:
    """Say what of a symbol is not as we rely on it."""
    try:
        found = find(one.symbol)
    except LookupError:
        yield f"{one.symbol} is gone ({one.why})"
        return
    for wanted in one.has:
        name, _, parameters = wanted.partition("(")
        if name and not has(found, name):
            yield f"{one.symbol} has no {name} ({one.why})"
        elif parameters or wanted.startswith("("):
            member = getattr(found, name) if name else found
            asked = re.findall(r"\w+", parameters)
            if missing := lacking(member, asked):
                yield f"{wanted} of {one.symbol}: takes no {missing} ({one.why})"


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has it; a class also by what its methods assign."""
    if hasattr(owner, name):
        return True
    if isinstance(owner, ModuleType):
        return False
    if dataclasses.is_dataclass(owner):
        return name in {field.name for field in dataclasses.fields(owner)}
    return any(name in assigned(base) for base in owner.__mro__ if base is not object)


def assigned(cls: type) -> set[str]:
    """Attributes of ``self`` that the methods of a class assign or declare."""
    source = textwrap.dedent(inspect.getsource(cls))
    found = set()
    for node in ast.walk(ast.parse(source)):
        is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_own and node.value.id == "self" and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def lacking(function: Any, asked: list[str]) -> str:
    """The first parameter that ``function`` does not take at its place, if any."""
    names = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    for place, name in enumerate(asked):
        if names[place : place + 1] != [name]:
            return name
    return ""


def imports() -> set[str]:
    """All that kvserve imports of vLLM's inside, wherever it does."""
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name for name in names if name.startswith(INSIDE)}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                found |= {name for name in names if name.startswith(INSIDE)}
    return found


def overrides() -> Iterator[tuple[type, type, str]]:
    """Our classes, those of vLLM that they are made of, and what both define."""
    for room in ("scheduling", "worker", "devices"):
        for file in (ROOT / "engine" / room).glob("*.py"):
            if file.stem not in ("__init__", "gpu", "gpu_staging", "mirror"):
                importlib.import_module(f"kvserve.engine.{room}.{file.stem}")
    importlib.import_module("kvserve.engine.spec")
    ours = [
        value
        for name, module in sorted(sys.modules.items())
        if name.startswith("kvserve.engine.")
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name
    ]
    for cls in dict.fromkeys(ours):
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith(INSIDE):
                continue
            for name in vars(cls).keys() & vars(base).keys():
                if not name.startswith("__") and callable(getattr(base, name)):
                    yield cls, base, name


def narrower(ours: Any, theirs: Any) -> str:
    """The first parameter of ``theirs`` that ``ours`` does not take, if any."""
    taken = inspect.signature(ours).parameters.values()
    kinds = {parameter.kind for parameter in taken}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    names = {parameter.name for parameter in taken}
    for parameter in inspect.signature(theirs).parameters.values():
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if parameter.kind in variable or parameter.name in names or takes_any:
            continue
        return parameter.name
    return ""


@pytest.mark.parametrize("one", [*BORDER, *REPLACED], ids=lambda one: one.symbol)
def test_vllm_has_what_we_rely_on(one: Relied) -> None:
    assert list(faults(one)) == []


def test_the_table_names_what_is_imported_and_nothing_else() -> None:
    named = {one.symbol for one in BORDER}
    assert len(named) == len(BORDER)
    assert named == imports()


def test_what_we_override_takes_what_vllm_passes() -> None:
    compared = list(overrides())
    assert len(compared) > 30
    found = [
        f"{cls.__name__}.{name} takes no {missing}, as {base.__name__}'s does"
        for cls, base, name in compared
        if (missing := narrower(getattr(cls, name), getattr(base, name)))
    ]
    assert found == []


def test_the_table_names_every_method_that_we_override() -> None:
    """Else one that vLLM renames would merely not be called any more."""
    named = {wanted.partition("(")[0] for one in BORDER for wanted in one.has}
    assert {name for _, _, name in overrides()} - named == set()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Relied("vllm.v1.core.gone.Thing", "why"), "is gone"),
        (Relied("vllm.v1.request.Request", "why", ("colour",)), "has no colour"),
        (
            Relied("vllm.v1.core.block_pool.BlockPool", "why", ("touch(pages)",)),
            "takes no pages",
        ),
        (
            Relied("vllm.v1.core.kv_cache_utils.get_block_hash", "why", ("(name)",)),
            "takes no name",
        ),
    ],
)
def test_what_moved_is_named(wanted: Relied, said: str) -> None:
    (found,) = faults(wanted)
    assert said in found
    assert wanted.symbol in found
    assert "(why)" in found


def test_an_override_that_is_too_narrow_is_named() -> None:
    def theirs(self: Any, request: Any, moved: int = 0) -> None: ...
    def ours(self: Any, request: Any) -> None: ...
    def wide(self: Any, request: Any, **others: Any) -> None: ...

    assert narrower(ours, theirs) == "moved"
    assert narrower(wide, theirs) == ""
