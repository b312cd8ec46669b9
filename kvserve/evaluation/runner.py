# SPDX-License-Identifier: Apache-2.0
"""Runs every policy through every task, one engine at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.errors import UserError
from kvserve.evaluation.backend import Backend, Reply, Request
from kvserve.evaluation.continuations import (
    Reference,
    mean_divergence,
    nll,
    top1_share,
)
from kvserve.evaluation.statistics import distinct
from kvserve.evaluation.store import Cell, Key, Store, Timing
from kvserve.evaluation.tasks import SAID, Sample, Task
from policies.budgets import Arguments

REFERENCE = "full"
"""Name of the policy that others are measured against."""


class Contender(Protocol):
    """What is measured: a policy, or a server."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def can(self, length: int) -> bool:
        """Whether it is measured at this length."""

    def arguments(self, length: int) -> Arguments:
        """What it runs with at this length; equal arguments share an engine."""

    def open(self, arguments: Arguments) -> Backend:
        """Start, or reach, the engine."""


@dataclass(frozen=True)
class Assignment:
    """One task at one length, its samples made."""

    task: Task
    length: int
    samples: list[Sample]

    @property
    def tokens(self) -> int:
        return sum(sample.request.tokens for sample in self.samples)

    def key(self, contender: Contender) -> Key:
        return contender.name, self.task.name, self.length


class Runner:
    """Fills a store with the cells that it lacks.

    Args:
        assignments: what every contender does.
        store: where cells go, and where those of an earlier run are.
        show: draw a progress bar, with an estimate of what is left.
    """

    def __init__(
        self, assignments: Sequence[Assignment], store: Store, show: bool = True
    ) -> None:
        self._assignments, self._store, self._show = assignments, store, show

    def run(self, contenders: Sequence[Contender]) -> None:
        """Measure what is missing, the reference first.

        Raises:
            UserError: an engine cannot do what is asked of it.
        """
        ordered = sorted(contenders, key=lambda one: one.name != REFERENCE)
        sessions = [
            session for contender in ordered for session in self._sessions(contender)
        ]
        total = sum(self._cost(session) for session in sessions)
        with self._bar(total) as bar:
            for session in sessions:
                bar.set_description(f"{session.contender.name}: starting")
                with closing(session.contender.open(session.arguments)) as backend:
                    for assignment in session.assignments:
                        where = f"{assignment.task.name} {assignment.length}"
                        bar.set_description(f"{session.contender.name}: {where}")
                        self._measure(session, assignment, backend, bar.update)

    def _bar(self, total: int) -> Any:
        return tqdm(
            total=total,
            unit="token",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (self._show and total),
        )

    def _sessions(self, contender: Contender) -> Iterator[_Session]:
        """Group what is missing of a contender by engines that can share it."""
        groups: dict[str, list[Assignment]] = {}
        for assignment in self._assignments:
            if not contender.can(assignment.length):
                continue
            if assignment.key(contender) not in self._store.cells:
                arguments = contender.arguments(assignment.length)
                key = json.dumps(arguments, sort_keys=True)
                groups.setdefault(key, []).append(assignment)
        for key, assignments in groups.items():
            yield _Session(contender, json.loads(key), assignments)

    def _cost(self, session: _Session) -> int:
        """Tokens to run; the reference answers twice where agreement is asked for."""
        return sum(
            assignment.tokens * (2 if self._refers(session, assignment) else 1)
            for assignment in session.assignments
        )

    def _refers(self, session: _Session, assignment: Assignment) -> bool:
        """Whether this cell must first make what others are compared with."""
        return (
            assignment.task.kind == "agreement"
            and session.contender.name == REFERENCE
            and (assignment.task.name, assignment.length) not in self._store.references
        )

    def _measure(
        self,
        session: _Session,
        assignment: Assignment,
        backend: Backend,
        update: Callable[[int], Any],
    ) -> None:
        def done(request: Request) -> None:
            update(request.tokens)

        requests = [sample.request for sample in assignment.samples]
        references: list[Reference] = []
        if assignment.task.kind == "agreement":
            if self._refers(session, assignment):
                said = [
                    Reference(reply.token_ids, reply.tops)
                    for reply in backend.run(requests, done)
                ]
                self._store.add_references(
                    assignment.task.name, assignment.length, said
                )
            references = self._references(assignment)
            requests = [
                reference.force(request)
                for reference, request in zip(references, requests, strict=True)
            ]
        start = time.monotonic()
        replies = backend.run(requests, done)
        timing = _timing(time.monotonic() - start, replies)
        cell = _cell(session, assignment, references, replies)
        self._store.add(replace(cell, timing=timing))

    def _references(self, assignment: Assignment) -> list[Reference]:
        found = self._store.references.get((assignment.task.name, assignment.length))
        if found is None:
            raise UserError(
                f"--task {assignment.task.name}: compares with the full cache; add "
                "--policy full, or name a server that has one: --url full=URL"
            )
        return found


@dataclass(frozen=True)
class _Session:
    """What one engine does."""

    contender: Contender
    arguments: Arguments
    assignments: list[Assignment]


def _cell(
    session: _Session,
    assignment: Assignment,
    references: list[Reference],
    replies: list[Reply],
) -> Cell:
    samples, kind = assignment.samples, assignment.task.kind
    compared = list(zip(references, replies, strict=True)) if references else []
    if kind == "perplexity":
        scores = [nll(reply) for reply in replies]
    elif kind == "agreement":
        scores = [top1_share(reference, reply) for reference, reply in compared]
    else:
        pairs = zip(samples, replies, strict=True)
        scores = [sample.score(reply.text) for sample, reply in pairs]
    pages = [reply.pages for reply in replies if reply.pages]
    return Cell(
        session.contender.name,
        assignment.task.name,
        assignment.length,
        kind,
        session.arguments,
        scores,
        [sample.depth for sample in samples],
        [reply.text for reply in replies] if kind in SAID else [],
        [mean_divergence(reference, reply) for reference, reply in compared],
        [one.held for one in pages],
        [one.peak for one in pages],
        [one.full for one in pages],
        pages[0].page_bytes if pages else 0,
        _distinct(samples, replies) if assignment.task.is_long else [],
    )


def _timing(seconds: float, replies: list[Reply]) -> Timing:
    told = [one.first_after for one in replies if one.first_after is not None]
    return Timing(seconds, sum(len(one.token_ids) for one in replies), told)


def _distinct(samples: list[Sample], replies: list[Reply]) -> list[float]:
    return [
        distinct(reply.token_ids[len(sample.request.forced) :])
        for sample, reply in zip(samples, replies, strict=True)
    ]
