# SPDX-License-Identifier: Apache-2.0
"""What every benchmark writes: tables as Markdown and JSON, and the machine's name."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OUT = Path("benchmarks/results")


@dataclass(frozen=True)
class Spread:
    """Median, least and most of what was measured, in one unit."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def shown(self, unit: float = 1.0, digits: int = 2) -> str:
        parts = (self.median, self.least, self.most)
        median, least, most = (f"{part * unit:.{digits}f}" for part in parts)
        return f"{median} ({least} to {most})"


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of ``values`` over ``base``, which took turns."""
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


@dataclass
class Table:
    """A title, column heads, and rows of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        return f"### {self.title}\n\n{self.body()}"

    def body(self) -> str:
        """The table without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass
class Report:
    """The tables of one run, and the numbers that they come from.

    Attributes:
        name: of the benchmark's module; names the files.
        numbers: whatever JSON can hold.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Print the tables, and write ``NAME.md`` and ``NAME.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.{self.name} {shlex.join(sys.argv[1:])}"
        head = f"    {command.strip()}\n\n{machine()}.\n\n"
        text = head + "\n".join(table.markdown() for table in self.tables)
        print(text, flush=True)
        directory.joinpath(f"{self.name}.md").write_text(text)
        saved = {
            "command": command.strip(),
            "machine": machine(),
            "tables": [asdict(table) for table in self.tables],
            "numbers": self.numbers,
        }
        content = json.dumps(saved, indent=1) + "\n"
        directory.joinpath(f"{self.name}.json").write_text(content)


def machine() -> str:
    """Name processor, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
