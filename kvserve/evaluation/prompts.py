# SPDX-License-Identifier: Apache-2.0
"""What tasks are made of: draws, questions, and contexts that fill a length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import Request
from kvserve.evaluation.tasks import Place
from kvserve.texts.haystack import DATA, insert, passage
from kvserve.texts.needles import chat, encode, fit

WORDS = tuple((DATA / "words.txt").read_text(encoding="utf-8").split())
Hidden = list[tuple[str, float]]
"""Sentences, and how deep in the text each lies."""

_NOISE = (
    "The door is shut. The lamp is lit. The rain is over. Here we wait. Nothing else "
    "is new.\n"
)


@dataclass(frozen=True)
class Ask:
    """What is asked of a text.

    ``told`` and ``question`` speak of the text *above*.

    Attributes:
        question: without the word "Question".
        reply: how the reply begins, which is put into the model's mouth.
        told: what the model is told of the text.
        example: a text, a question and its right answer, ahead of everything.
    """

    question: str
    reply: str
    told: str
    example: str = ""


@dataclass(frozen=True)
class Rendered:
    """Text that has been tokenized."""

    token_ids: list[int]


def rng_of(task: str, place: Place) -> random.Random:
    """The draws of one sample."""
    return random.Random(f"{task}/{place.seed}/{place.length}/{place.index}")


def draw_depths(rng: random.Random, count: int) -> list[float]:
    """Draw places in ascending order, one in each ``count``-th of the text."""
    return [(number + rng.random()) / count for number in range(count)]


def content(context: str, ask: Ask, question_first: bool = False) -> str:
    """A user's turn: the question behind its text, or ahead of it."""
    asked = f"{ask.told}\nQuestion: {ask.question}"
    if question_first:
        # No name, word or number that tasks draw has this word in it.
        return f"{ask.example}{asked.replace('above', 'below')}\n\n{context}"
    return f"{ask.example}{context}\n\n{asked}"


def worked_example(context: str, ask: Ask, answer: str, place: Place) -> str:
    """A text with its question and answer, as ``Ask.example`` takes it."""
    turn = content(context, ask, place.question_first)
    return f"{turn}\nAnswer: {ask.reply} {answer}\n\n"


def render(place: Place, context: str, ask: Ask) -> Rendered:
    """A whole prompt."""
    turn = content(context, ask, place.question_first)
    text = chat(place.tokenizer, turn, ask.reply)
    return Rendered(encode(place.tokenizer, text)[0])


def novel(task: str, place: Place) -> str:
    """More prose than the length has room for, from a place of its own."""
    start = rng_of(f"passage/{task}", place).random()
    return passage(place.text, start, 8 * place.length)


def noise(place: Place) -> str:
    """The same few sentences over and over."""
    return _NOISE * (8 * place.length // len(_NOISE) + 1)


def hide(
    place: Place,
    prose: str,
    hidden: Hidden,
    ask: Ask,
    *,
    reply: int,
    forced: Sequence[int] = (),
    one_line: bool = False,
) -> Request:
    """Hide sentences in as much prose as the length has room for.

    Args:
        reply, one_line: see :class:`Request`.
        forced: tokens that follow the prompt; the request then goes on to its end.

    Raises:
        UserError: the length has no room for prose.
    """
    room = place.length - reply - len(forced)
    # The deepest goes in first, so that it does not shift the others.
    deepest_first = sorted(hidden, key=lambda one: -one[1])

    def rendered(haystack: str) -> Rendered:
        for sentence, depth in deepest_first:
            haystack, _ = insert(haystack, sentence, depth)
        return render(place, haystack, ask)

    prompt = fit(place.tokenizer, prose, room, rendered)
    if prompt is None:
        raise UserError("too short for the question; use a longer length")
    return Request(
        prompt.token_ids,
        list(forced),
        reply,
        one_line=one_line,
        to_the_end=bool(forced),
    )


def most_that_fits(
    least: int, most: int, fits: Callable[[int], bool], what: str
) -> int:
    """The greatest number from ``least`` to ``most`` that fits.

    Args:
        fits: true up to a number, and false from there on.
        what: of which there are so many, for a message.

    Raises:
        UserError: not even ``least`` does.
    """
    if least > most or not fits(least):
        raise UserError(f"too short for {what}; use a longer length")
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def fill(
    place: Place,
    context: Callable[[int], str],
    ask: Ask,
    *,
    bounds: tuple[int, int],
    what: str,
    reply: int,
) -> Request:
    """Make a context of as many items as the length has room for.

    Args:
        context: a text of so many items.
        bounds: the least and most of them.
        what: the least of them, for a message.

    Raises:
        UserError: the length has no room for the least.
    """
    room = place.length - reply

    def tokens(items: int) -> list[int]:
        return render(place, context(items), ask).token_ids

    items = most_that_fits(*bounds, lambda count: len(tokens(count)) <= room, what)
    return Request(tokens(items), reply=reply)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Tokens of text that stands in the middle of a prompt."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
