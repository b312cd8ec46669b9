# SPDX-License-Identifier: Apache-2.0
"""Finished cells, in a file that grows: what Ctrl-C keeps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.continuations import Reference

FILE = "cells.jsonl"
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Timing:
    """How long the requests of a cell took, which is another in every run.

    Attributes:
        seconds: for all of them, those that ran together counted once.
        tokens: of all replies, forced ones included.
        first_after: seconds to each request's first token; empty where the engine
            does not tell.
    """

    seconds: float
    tokens: int
    first_after: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """What one policy scored in one task at one length, sample by sample.

    Attributes:
        policy, task, length: what was asked for; the key.
        kind: the task's.
        arguments: parameters that the policy ran with.
        scores: of every sample: share of answers found, or of equal top tokens, or
            for perplexity the mean negative log likelihood in nats.
        depths: where the answer lay; ``None`` where that is not one place.
        replies: what was said.
        divergences: KL divergence from the full cache, in nats; agreement only.
        pages_held, pages_peak, pages_full: of every sample, see ``Pages``; empty where
            the engine does not tell.
        page_bytes: size of a page; 0 likewise.
        distinct: share of different 4-grams in each reply, of tasks with long ones.
        timing: kept beside the cell, which is the same in every run.
    """

    policy: str
    task: str
    length: int
    kind: str
    arguments: dict[str, Any]
    scores: list[float]
    depths: list[float | None]
    replies: list[str]
    divergences: list[float] = field(default_factory=list)
    pages_held: list[int] = field(default_factory=list)
    pages_peak: list[int] = field(default_factory=list)
    pages_full: list[int] = field(default_factory=list)
    page_bytes: int = 0
    distinct: list[float] = field(default_factory=list)
    timing: Timing | None = None

    @property
    def key(self) -> Key:
        return self.policy, self.task, self.length


class Store:
    """Cells and references of one set of conditions.

    Args:
        folder: where ``cells.jsonl`` is; made if it is not there.
        conditions: what all cells must share to be compared.

    Raises:
        UserError: the folder holds cells of other conditions, or cannot be written.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.conditions = conditions
        self.cells: dict[Key, Cell] = {}
        self.references: dict[tuple[str, int], list[Reference]] = {}
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._read()
            # A run that was killed may have left half a line: write behind its end.
            torn = self._path.exists() and not self._path.read_text().endswith("\n")
            self._file = self._path.open("a")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--out {folder}: cannot be used ({error})") from None
        if torn:
            self._file.write("\n")
        if self._file.tell() == 0:
            self._write({"conditions": conditions})

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        self.cells[cell.key] = cell
        record = dataclasses.asdict(cell)
        timing = record.pop("timing")
        self._write({"cell": record, "timing": timing})

    def add_references(self, task: str, length: int, found: list[Reference]) -> None:
        """Keep what the full cache said to every sample of a task."""
        self.references[task, length] = found
        replies = [reference.to_json() for reference in found]
        self._write({"references": replies, "task": task, "length": length})

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _read(self) -> None:
        if not self._path.exists():
            return
        for line in self._path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                # Half a line of a run that was killed: its cell is measured again.
                continue
            if "conditions" in record:
                self._check(record["conditions"])
            elif "cell" in record:
                timing = record.get("timing")
                cell = Cell(
                    **record["cell"], timing=Timing(**timing) if timing else None
                )
                self.cells[cell.key] = cell
            else:
                found = [Reference.from_json(one) for one in record["references"]]
                self.references[record["task"], record["length"]] = found

    def _check(self, saved: dict[str, Any]) -> None:
        for name in saved.keys() | self.conditions.keys():
            was, now = saved.get(name), self.conditions.get(name)
            if was != now:
                raise UserError(
                    f"--out {self._path.parent}: holds results with {name} {was}, and "
                    f"this command has {now}; name another folder"
                )
