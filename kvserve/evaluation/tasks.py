# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is asked, at which length, and how replies are scored.

A task's length counts prompt and reply, as RULER's does, so that the longest length is
the model's context. Every sample follows from (task, seed, length, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from kvserve.errors import UserError
from kvserve.evaluation.backend import Request


class Grade(Protocol):
    """Scores a reply, 0 to 1; equal ones score alike."""

    def __call__(self, reply: str, /) -> float: ...


REPLY = 256
"""Tokens of a long reply, unless it is said."""


@dataclass(frozen=True)
class Sample:
    """A request, and what its reply should say.

    Attributes:
        answers: strings that a reply should contain; empty where nothing is said.
        depth: where in the context the answer lies, 0 to 1, if in one place.
        grade: scores the reply, if not by its answers.
    """

    request: Request
    answers: tuple[str, ...] = ()
    depth: float | None = None
    grade: Grade | None = None

    def score(self, text: str) -> float:
        """What ``grade`` says, else the share of answers in ``text``, as RULER's."""
        if self.grade is not None:
            return self.grade(text)
        found = [answer.lower() in text.lower() for answer in self.answers]
        return sum(found) / len(found)


@dataclass(frozen=True)
class Place:
    """One sample's place among all: its task's draws depend on nothing else.

    Attributes:
        length: tokens of prompt and reply together.
        index: number of the sample, of ``count``.
        question_first: ask ahead of the context, not behind it.
        reply: tokens of a long reply, where the task asks for one.
    """

    tokenizer: Any
    text: str
    seed: int
    length: int
    index: int
    count: int
    question_first: bool = False
    reply: int = REPLY

    @property
    def depth(self) -> float:
        """Depths are spread evenly over the samples."""
        return (2 * self.index + 1) / (2 * self.count)


Kind = Literal["answers", "instructions", "perplexity", "agreement"]
SAID = ("answers", "instructions")
"""Kinds that score what a reply says."""

Build = Callable[[Place], Sample]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: how replies become scores: ``answers`` counts strings that were found,
            ``perplexity`` and ``agreement`` look at probabilities. ``instructions``
            have a score too, and one that says something where the full cache's is
            low.
        what: one line for people.
        has_question: its question may stand ahead of the context as well.
        question_first: it does.
        is_long: replies are as long as they are asked to be, and may repeat themselves.
        forces: needs an engine that takes forced tokens.
    """

    name: str
    kind: Kind
    what: str
    build: Build
    has_depth: bool = False
    has_question: bool = False
    question_first: bool = False
    is_long: bool = False
    forces: bool = False

    def asked_before(self) -> Task:
        """The same prompts, their question ahead of the context."""
        return replace(
            self,
            name=f"{self.name}-before",
            what=f"{self.what}, asked before the text",
            question_first=True,
        )

    def samples(
        self,
        tokenizer: Any,
        text: str,
        seed: int,
        length: int,
        count: int,
        reply: int = REPLY,
    ) -> list[Sample]:
        """Make all samples of one length.

        Args:
            reply: tokens of a long reply, where the task asks for one.

        Raises:
            UserError: the length is too short for the task.
        """
        try:
            return [
                self.build(
                    Place(
                        tokenizer,
                        text,
                        seed,
                        length,
                        index,
                        count,
                        self.question_first,
                        reply,
                    )
                )
                for index in range(count)
            ]
        except UserError as error:
            raise UserError(f"--task {self.name} --length {length}: {error}") from None
