# SPDX-License-Identifier: Apache-2.0
"""Engines that answer at once, for tests of what drives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvserve.evaluation.backend import Pages, Reply, Request
from kvserve.evaluation.runner import Assignment
from kvserve.evaluation.tasks import Sample, Task
from policies.budgets import Arguments


class FakeBackend:
    """Says "yes" to the first ``right`` requests of a batch, "no" to the others."""

    def __init__(self, right: int, held: int, log: list[str]) -> None:
        self._right, self._held, self._log = right, held, log

    def run(
        self, requests: Sequence[Request], done: Callable[[Request], None]
    ) -> list[Reply]:
        self._log.append(f"run {len(requests)}")
        for request in requests:
            done(request)
        return [self._reply(n, request) for n, request in enumerate(requests)]

    def _reply(self, number: int, request: Request) -> Reply:
        text = "yes" if number < self._right else "no"
        count = len(request.forced) + request.reply
        token_ids = [*request.forced, *([7] * request.reply)]
        top = {7: math.log(0.6), 8: math.log(0.4)}
        if number >= self._right:
            top = {7: math.log(0.4), 8: math.log(0.6)}
        pages = Pages(self._held, 2 * self._held, 100, 1024)
        return Reply(text, token_ids, [-1.0] * count, [top] * count, pages, 0.5)

    def close(self) -> None:
        self._log.append("close")


@dataclass
class FakeContender:
    """A policy that answers ``right`` requests and holds ``held`` of 100 pages."""

    name: str
    right: int
    held: int = 100
    by_length: bool = False
    without: frozenset[int] = frozenset()
    fails: bool = False
    log: list[str] = field(default_factory=list)

    def can(self, length: int) -> bool:
        return length not in self.without

    def arguments(self, length: int) -> Arguments:
        return {"length": length} if self.by_length else {}

    def open(self, arguments: Arguments) -> FakeBackend:
        if self.fails:
            raise KeyboardInterrupt
        self.log.append("open")
        return FakeBackend(self.right, self.held, self.log)


def task(name: str = "task", kind: Any = "answers", is_long: bool = False) -> Task:
    return Task(name, kind, "a task of tests", lambda _: _sample(), is_long=is_long)


def _sample() -> Sample:
    return Sample(Request([1, 2, 3], reply=4), ("yes",), 0.5)


def assignment(length: int = 64, count: int = 4, **of_task: Any) -> Assignment:
    return Assignment(task(**of_task), length, [_sample() for _ in range(count)])
