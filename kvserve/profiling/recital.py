# SPDX-License-Identifier: Apache-2.0
"""Long text with several needles in it, and a reply that recites them all."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.texts.haystack import insert, passage
from kvserve.texts.needles import Family, Needle, chat, encode, fit

_INSTRUCTION = "Repeat every made-up fact of the text above."


@dataclass(frozen=True)
class Recital:
    """A prompt and its reply, to be read by a model in one pass.

    Attributes:
        token_ids: The prompt, then each needle's sentence on a line of its own.
        answers: Positions in ``token_ids`` of the answers' tokens in the reply: what
            can only be known from the text above.
    """

    token_ids: list[int]
    answers: list[int]


def build_recital(
    tokenizer: Any, family: Family, num_tokens: int, count: int, seed: str, text: str
) -> Recital:
    """Hide ``count`` needles in prose and recite them in another order.

    Args:
        num_tokens: Length of the whole, reached within a few tokens.
        seed: Draws the needles, the passage, the depths and the order.
        text: Prose to hide the needles in.

    Raises:
        UserError: ``num_tokens`` leaves no room for prose.
    """
    rng = random.Random(seed)
    needles = _distinct(family, count, rng)
    prose = passage(text, rng.random(), 8 * num_tokens)
    depths = [(number + rng.random()) / count for number in range(count)]
    order = rng.sample(needles, count)

    def render(hidden: str) -> Recital:
        for needle, depth in zip(needles, depths, strict=True):
            hidden, _ = insert(hidden, needle.sentence, depth)
        return _recite(tokenizer, f"{hidden}\n\n{_INSTRUCTION}", order)

    recital = fit(tokenizer, prose, num_tokens, render)
    if recital is None:
        raise UserError(f"{count} needles do not fit in {num_tokens} tokens")
    return recital


def _distinct(family: Family, count: int, rng: random.Random) -> list[Needle]:
    """Draw needles whose questions differ, so that each has one answer."""
    drawn: dict[str, Needle] = {}
    while len(drawn) < count:
        needle = family.needle(rng.randrange(1 << 20))
        drawn.setdefault(needle.question, needle)
    return list(drawn.values())


def _recite(tokenizer: Any, content: str, needles: list[Needle]) -> Recital:
    reply = "\n".join(needle.sentence for needle in needles)
    rendered = chat(tokenizer, content, reply) + "\n"
    spans = []
    sentence = len(rendered) - len(reply) - 1
    for needle in needles:
        first = sentence + needle.sentence.index(needle.answer)
        spans.append((first, first + len(needle.answer)))
        sentence += len(needle.sentence) + 1
    token_ids, offsets = encode(tokenizer, rendered)
    answers = [
        index
        for index, (begin, end) in enumerate(offsets)
        if any(begin < last and end > first for first, last in spans)
    ]
    return Recital(token_ids, answers)
