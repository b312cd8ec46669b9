# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks: requests drawn from the novels that ship, or from a file.

A workload is the same text for every model and policy: it depends on its name, its
lengths and its seed alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvserve.errors import UserError
from kvserve.texts.haystack import Book, load_book, passage
from kvserve.texts.user_files import read_objects

Message = dict[str, str]

# Of these two novels, by the tokenizer of the embedded model.
_CHARACTERS_PER_TOKEN = 4.4
_BOOKS: tuple[Book, ...] = ("northanger_abbey", "persuasion")
_FORM = (
    'expected {"prompt": "...", "output_tokens": 64}, or messages instead of a prompt, '
    "or turns"
)
Lines = Sequence[tuple[str, dict[str, Any]]]
"""Of a file: where each is, as a message about it begins, and its object."""


@dataclass(frozen=True)
class Request:
    """One request: the conversation so far, and how many tokens to reply with."""

    messages: tuple[Message, ...]
    output_tokens: int

    def to_json(self) -> dict[str, Any]:
        """One line of a workload file; a single question is written as a prompt."""
        if len(self.messages) == 1:
            return {
                "prompt": self.messages[0]["content"],
                "output_tokens": self.output_tokens,
            }
        return {"messages": list(self.messages), "output_tokens": self.output_tokens}


class Entry(Protocol):
    """What a line of a workload file stands for."""

    def to_json(self) -> dict[str, Any]:
        """The line."""


Build = Callable[[random.Random, int], tuple[Message, ...]]


@dataclass(frozen=True)
class Workload:
    """A kind of load; lengths are means, a request's own are within a quarter."""

    about: str
    prompt_tokens: int
    output_tokens: int
    build: Build


def draw_workload(
    name: str,
    count: int,
    seed: int,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
) -> list[Request]:
    """Return ``count`` requests of the workload ``name``.

    Args:
        prompt_tokens: mean length of a prompt, as near as characters tell.
        output_tokens: mean length of a reply, exact in tokens.
    """
    workload = WORKLOADS[name]
    requests = []
    for index in range(count):
        rng = random.Random(f"{name}/{seed}/{index}")
        prompt = _near(rng, prompt_tokens or workload.prompt_tokens)
        output = _near(rng, output_tokens or workload.output_tokens)
        requests.append(Request(workload.build(rng, prompt), output))
    return requests


def read_lines(path: Path) -> Lines:
    """Read a workload file, whatever its lines stand for.

    Raises:
        UserError: names the file, and the line that is no object.
    """
    return list(read_objects(path, "--workload", _FORM))


def requests_in(lines: Lines, output_tokens: int | None = None) -> list[Request]:
    """Requests of a file: ``prompt`` or ``messages``, and ``output_tokens``, a line.

    Args:
        output_tokens: length of every reply, instead of what the file says.

    Raises:
        UserError: names the file, the line and what is wrong with it.
    """
    return [_parse(record, output_tokens, where) for where, record in lines]


def write_workload(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file for :func:`read_lines`; guidellm reads its prompts as well."""
    lines = (json.dumps(entry.to_json()) + "\n" for entry in entries)
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write-workload {path}: {error.strerror}") from None


def _parse(record: dict[str, Any], output_tokens: int | None, where: str) -> Request:
    tokens = reply_tokens(record, output_tokens, where)
    return Request(_messages(record, where), tokens)


def reply_tokens(record: dict[str, Any], given: int | None, where: str) -> int:
    """Length of a reply: what was given for all, or what the file says.

    Raises:
        UserError: neither says it.
    """
    tokens = given or record.get("output_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UserError(
            f"{where}: output_tokens must be a whole number of at least 1; or give "
            "--output-tokens"
        )
    return tokens


def _messages(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    messages = record.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": record.get("prompt")}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list of role and content")
    for message in messages:
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) and message[key] for key in keys
        ):
            raise UserError(
                f"{where}: needs a prompt, or messages that each have role and content"
            )
    return tuple({key: m[key] for key in ("role", "content")} for m in messages)


def _near(rng: random.Random, mean: int) -> int:
    return max(1, round(mean * rng.uniform(0.75, 1.25)))


def prose(rng: random.Random, tokens: float) -> str:
    text = load_book(rng.choice(_BOOKS))
    return passage(text, rng.random(), max(1, int(tokens * _CHARACTERS_PER_TOKEN)))


def _chat(rng: random.Random, prompt_tokens: int) -> tuple[Message, ...]:
    """A conversation of up to four earlier turns, and a new question."""
    turns = rng.randint(0, 4)
    # A reply is three times as long as a question.
    share = prompt_tokens / (4 * turns + 1)
    messages: list[Message] = []
    for _ in range(turns):
        question = f"What do you make of this? {prose(rng, share)}"
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": prose(rng, 3 * share)})
    question = f"{rng.choice(FOLLOW_UPS)} {prose(rng, share)}"
    return (*messages, {"role": "user", "content": question})


def _long_document(rng: random.Random, prompt_tokens: int) -> tuple[Message, ...]:
    """A chapter or two, and a question about it."""
    content = f"{prose(rng, prompt_tokens)}\n\n{rng.choice(_QUESTIONS)}"
    return ({"role": "user", "content": content},)


def _long_generation(rng: random.Random, prompt_tokens: int) -> tuple[Message, ...]:
    """A beginning, to be continued at length."""
    content = f"Continue this story, chapter by chapter:\n\n{prose(rng, prompt_tokens)}"
    return ({"role": "user", "content": content},)


FOLLOW_UPS = (
    "And how does it go on?",
    "Say that more simply:",
    "Who is meant here?",
    "Answer this letter:",
)
_QUESTIONS = (
    "Who are the people in this text, and how are they related?",
    "Summarise this text in five sentences.",
    "What does the heroine fear, and why? Quote the text.",
    "List every place that is named above and what happens there.",
)

WORKLOADS: dict[str, Workload] = {
    "chat": Workload("conversations of one to five turns", 400, 96, _chat),
    "long-document": Workload(
        "questions about one or two chapters", 3500, 64, _long_document
    ),
    "long-generation": Workload("stories to continue", 100, 768, _long_generation),
}
