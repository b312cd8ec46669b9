# SPDX-License-Identifier: Apache-2.0
"""From cells to what a report says: scores with intervals, memory, ratios to full."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvserve.evaluation.runner import REFERENCE
from kvserve.evaluation.statistics import bootstrap, interval
from kvserve.evaluation.store import Cell
from kvserve.evaluation.tasks import SAID

USABLE = 0.5
"""Below this mean score of the full cache a task says nothing about policies."""

_RANKED = (*SAID, "agreement")


@dataclass(frozen=True)
class Memory:
    """KV memory of a request, the mean over samples.

    Attributes:
        held: pages held at the end, as a share of what a full cache would hold.
        peak: the most that was held at once, likewise.
        bytes: pages held at the end, in bytes.
    """

    held: float
    peak: float
    bytes: float

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Memory | None:
        """Add up cells; ``None`` if the engine does not tell."""
        told = [cell for cell in cells if cell.pages_held]
        if not told:
            return None
        held, peak, full = (
            [pages for cell in told for pages in getattr(cell, f"pages_{what}")]
            for what in ("held", "peak", "full")
        )
        size = fmean(
            pages * cell.page_bytes for cell in told for pages in cell.pages_held
        )
        return cls(sum(held) / sum(full), sum(peak) / sum(full), size)


@dataclass(frozen=True)
class Speed:
    """How fast requests ran.

    Attributes:
        tokens_per_second: of all replies, over the time for prompts and replies.
        first_after: mean seconds from when a request is let in to its first token;
            ``None`` if the engine does not tell.
    """

    tokens_per_second: float
    first_after: float | None

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Speed | None:
        """Add up cells; ``None`` if none was timed."""
        timed = [cell.timing for cell in cells if cell.timing]
        seconds = sum(one.seconds for one in timed)
        if not seconds:
            return None
        first = [after for one in timed for after in one.first_after]
        tokens = sum(one.tokens for one in timed)
        return cls(tokens / seconds, fmean(first) if first else None)


@dataclass(frozen=True)
class Line:
    """A policy in one task at one length, or in all usable ones (task ``all``).

    Attributes:
        score: mean share of answers found, or of equal top tokens; perplexity itself.
        low, high: its 95 % interval.
        of_full: ratio to the full cache's score; ``None`` where that was not run.
        usable: whether the full cache itself can do the task.
        divergence: mean KL divergence from the full cache, in nats; agreement only.
        distinct: mean share of different 4-grams in a reply; long ones only.
    """

    policy: str
    task: str
    length: int
    kind: str
    score: float
    low: float
    high: float
    samples: int
    of_full: float | None
    usable: bool
    memory: Memory | None
    speed: Speed | None
    divergence: float | None = None
    distinct: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Summary:
    """All lines of a set of cells, and what a figure needs of them.

    Args:
        cells: in the order of policies that reports keep.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)
        self._full = {
            (cell.task, cell.length): cell for cell in cells if cell.policy == REFERENCE
        }
        self.lines = [self._line(cell) for cell in cells]
        self.overall = self._overall()

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(cell.policy for cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def lengths(self) -> list[int]:
        return sorted({cell.length for cell in self.cells})

    @property
    def unusable(self) -> list[Line]:
        """What the full cache cannot do, as its own lines."""
        return [one for one in self.lines if one.policy == REFERENCE and not one.usable]

    def line(self, policy: str, task: str, length: int) -> Line | None:
        """One line; ``None`` if it was not measured."""
        for line in [*self.lines, *self.overall]:
            if (line.policy, line.task, line.length) == (policy, task, length):
                return line
        return None

    def cell(self, policy: str, task: str, length: int) -> Cell | None:
        """One cell; ``None`` if it was not measured."""
        for cell in self.cells:
            if cell.key == (policy, task, length):
                return cell
        return None

    def _line(self, cell: Cell) -> Line:
        full = self._full.get((cell.task, cell.length))
        score, (low, high) = _score(cell)
        of_full = None
        if full is not None and _score(full)[0] > 0:
            of_full = score / _score(full)[0]
        return Line(
            cell.policy,
            cell.task,
            cell.length,
            cell.kind,
            score,
            low,
            high,
            len(cell.scores),
            of_full,
            self._is_usable(cell),
            Memory.of([cell]),
            Speed.of([cell]),
            fmean(cell.divergences) if cell.divergences else None,
            fmean(cell.distinct) if cell.distinct else None,
        )

    def _is_usable(self, cell: Cell) -> bool:
        full = self._full.get((cell.task, cell.length))
        return full is None or cell.kind != "answers" or fmean(full.scores) >= USABLE

    def _overall(self) -> list[Line]:
        """The mean over usable tasks, by length: of the first kind that there is."""
        lines = []
        for length in self.lengths:
            usable = [
                c for c in self.cells if c.length == length and self._is_usable(c)
            ]
            kinds = {cell.kind for cell in usable}
            kind = next((one for one in _RANKED if one in kinds), None)
            counted = [cell for cell in usable if cell.kind == kind]
            everyone = {cell.task for cell in counted}
            for policy in self.policies:
                own = [cell for cell in counted if cell.policy == policy]
                if own and {cell.task for cell in own} == everyone:
                    lines.append(self._mean(policy, length, own))
        return lines

    def _mean(self, policy: str, length: int, cells: list[Cell]) -> Line:
        scores = [score for cell in cells for score in cell.scores]
        low, high = _interval(cells[0].kind, scores)
        full = [self._full.get((cell.task, length)) for cell in cells]
        theirs = [score for cell in full if cell for score in cell.scores]
        complete = all(full) and sum(theirs) > 0
        return Line(
            policy,
            "all",
            length,
            cells[0].kind,
            fmean(scores),
            low,
            high,
            len(scores),
            fmean(scores) / fmean(theirs) if complete else None,
            True,
            Memory.of(cells),
            Speed.of(cells),
        )


def _score(cell: Cell) -> tuple[float, tuple[float, float]]:
    mean, (low, high) = fmean(cell.scores), _interval(cell.kind, cell.scores)
    if cell.kind == "perplexity":
        return math.exp(mean), (math.exp(low), math.exp(high))
    return mean, (low, high)


def _interval(kind: str, scores: list[float]) -> tuple[float, float]:
    """Only what is said is right or wrong; 1.0 of agreement is of many steps."""
    return interval(scores) if kind in SAID else bootstrap(scores)
