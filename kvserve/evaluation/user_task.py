# SPDX-License-Identifier: Apache-2.0
"""A user's own questions: a JSONL file as a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import Request
from kvserve.evaluation.tasks import Place, Sample, Task
from kvserve.texts.needles import chat, encode
from kvserve.texts.user_files import read_objects

_REPLY = 64
_FORM = 'expected {"prompt": "...", "answer": "..."}; answer may be a list of strings'


@dataclass(frozen=True)
class Question:
    """A prompt and the strings that a good reply contains."""

    prompt: str
    answers: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions, one JSON object a line; empty lines are skipped.

    Raises:
        UserError: names the file, and the line that is malformed.
    """
    found = read_objects(path, "--task", _FORM)
    return [_question(values, where) for where, values in found]


def _question(values: dict[str, Any], where: str) -> Question:
    prompt, answer = values.get("prompt"), values.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{where}: has no prompt; {_FORM}")
    if not isinstance(answers, list) or not all(
        isinstance(one, str) and one for one in answers or [None]
    ):
        raise UserError(f"{where}: has no answer; {_FORM}")
    return Question(prompt, tuple(answers))


@dataclass(frozen=True)
class UserTask:
    """Questions of a file, as a task of one length: their mean."""

    task: Task
    samples: list[Sample]

    @property
    def mean_length(self) -> int:
        """Tokens of a request, prompt and reply, on average."""
        return round(self._total / len(self.samples))

    @property
    def longest(self) -> int:
        return max(sample.request.tokens for sample in self.samples)

    @property
    def _total(self) -> int:
        return sum(sample.request.tokens for sample in self.samples)


def load_user_task(path: Path, tokenizer: Any) -> UserTask:
    """Make a task of a file; it is named after the file.

    Raises:
        UserError: the file is malformed.
    """
    samples = [
        Sample(
            Request(
                encode(tokenizer, chat(tokenizer, question.prompt))[0], reply=_REPLY
            ),
            question.answers,
        )
        for question in read_questions(path)
    ]

    def build(place: Place) -> Sample:
        return samples[place.index]

    return UserTask(
        Task(path.stem, "answers", f"questions of {path.name}", build), samples
    )
