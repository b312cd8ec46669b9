# SPDX-License-Identifier: Apache-2.0
"""Keep imports as the table of rooms in docs/architecture.md has them.

One line a violation, exit code 1. A room is a folder; files at the root of the package
are its entries or the ground. No room imports one above it, no file is in a ring, and
libraries that matter are imported where the table says.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_TABLE = "docs/architecture.md"
_ENTRIES = {"kvserve", "kvserve.cli", "kvserve.plugin"}
_ENTRY, _GROUND, _POLICIES = "kvserve", "ground", "policies"
_WATCHED = {"vllm", "torch", "triton", "transformers", "fastapi"}
_DEVICE = ("kvserve/engine/devices/", "kvserve/kernels/")


@dataclass(frozen=True)
class Room:
    """One line of the table; a higher floor has a smaller number."""

    floor: int
    imports: frozenset[str]
    libraries: frozenset[str]


def rooms(text: str) -> dict[str, Room]:
    """Read the table out of the page that has it."""
    table = text.split("<!-- rooms -->")[1].split("<!-- /rooms -->")[0]
    found: dict[str, Room] = {}
    for floor, line in enumerate(table.strip().splitlines()[2:]):
        name, _, imports, libraries = (cell.strip() for cell in line.split("|")[1:-1])
        room = name.split()[0].strip("`")
        libs = frozenset(re.findall(r"\w+", libraries))
        found[room] = Room(floor, frozenset(re.findall(r"`(\w+)`", imports)), libs)
        if imports == "everything":
            found[room] = Room(floor, frozenset({"everything"}), libs)
    return found


def room_of(module: str, known: dict[str, Room]) -> str:
    """Name the room of a module, the innermost folder that the table has."""
    if module in _ENTRIES:
        return _ENTRY
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        folder = "/".join(parts[:length])
        if folder in known and folder != _ENTRY:
            return folder
    return _GROUND


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Modules that a file imports, wherever it does; what is not ours by its top."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in whole]
        for name in names:
            yield name if name in modules else name.split(".")[0]


def violations(
    module: str, imports: set[str], modules: set[str], known: dict[str, Room]
) -> list[str]:
    """Say what a module imports that its room may not."""
    name = room_of(module, known)
    room, found = known[name], []
    for other in sorted(imports):
        if other in _WATCHED - room.libraries:
            found.append(f"imports {other}; {name} may not")
        if other not in modules:
            continue
        target = room_of(other, known)
        free = target in (name, _GROUND, _POLICIES) or "everything" in room.imports
        if not free and target.rsplit("/")[-1] not in room.imports:
            found.append(f"imports {other}; {name} may not import {target}")
        if known[target].floor < room.floor:
            found.append(f"imports {other}, from a floor above")
    return found


def ring(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, one after the other; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def main() -> int:
    """Check both packages."""
    known = rooms((_ROOT / _TABLE).read_text())
    files = {
        ".".join(file.relative_to(_ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        ): file
        for package in ("kvserve", "policies")
        for file in sorted((_ROOT / package).rglob("*.py"))
    }
    modules, graph, found = set(files), {}, []
    for module, file in files.items():
        source = file.read_text()
        imports = set(imported(ast.parse(source), modules))
        graph[module] = (imports & modules) - {module}
        path = file.relative_to(_ROOT).as_posix()
        found += [
            f"{path}: {text}" for text in violations(module, imports, modules, known)
        ]
        if "torch.cuda" in source and not path.startswith(_DEVICE):
            found.append(f"{path}: uses torch.cuda outside the devices")
    if cycle := ring(graph):
        found.append(f"a ring of imports: {' <- '.join(cycle)}")
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
