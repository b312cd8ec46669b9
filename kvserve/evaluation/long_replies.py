# SPDX-License-Identifier: Apache-2.0
"""Long replies: what a cache that evicts while it decodes can still say.

Both replies are known beforehand, so that a long one can be scored line by line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kvserve.errors import UserError
from kvserve.evaluation.prompts import WORDS, Ask, hide, novel, rng_of
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.needles import encode

_LEAST = 64


def in_order(expected: Sequence[str], said: Sequence[str]) -> float:
    """Share of ``expected`` that is said in its order."""
    matcher = SequenceMatcher(None, expected, said, autojunk=False)
    return sum(one.size for one in matcher.get_matching_blocks()) / len(expected)


@dataclass(frozen=True)
class Copied:
    """Share of lines that a reply repeats, in their order and to the letter."""

    lines: tuple[str, ...]

    def __call__(self, reply: str) -> float:
        return in_order(self.lines, [line.strip() for line in reply.splitlines()])


@dataclass(frozen=True)
class Counted:
    """Share of the numbers from ``first`` to ``last`` that come in their order."""

    first: int
    last: int

    def __call__(self, reply: str) -> float:
        expected = [str(number) for number in range(self.first, self.last + 1)]
        return in_order(expected, re.findall(r"\d+", reply))


def long_copy(place: Place) -> Sample:
    """A list in a novel, to repeat line by line, as long as the reply."""
    _check(place, 2 * place.reply)
    rng = rng_of("long-copy", place)
    entries = "\n".join(
        f"{' '.join(rng.sample(WORDS, 2))} {rng.randrange(100, 1000)}"
        for _ in range(place.reply)
    )
    # A reply's tokens may be cut in other places than the text's; a cut line is none.
    first, *lines = _cut(place, entries, place.reply * 15 // 16).split("\n")[:-1]
    text = "\n".join(lines)
    ask = Ask(
        "Repeat the whole list in its order, line by line.",
        f"{first}\n",
        "The text above has a list in it.",
    )
    hidden = [(f"\n\n{first}\n{text}\n\n", place.depth)]
    prose = novel("long-copy", place)
    request = hide(place, prose, hidden, ask, reply=place.reply)
    return Sample(request, (text,), place.depth, Copied(tuple(lines)))


def long_count(place: Place) -> Sample:
    """Numbers to write down, one after the other, behind a novel that is no help."""
    _check(place, place.reply)
    first = rng_of("long-count", place).randrange(100, 900)
    numbers = "\n".join(str(first + 2 + step) for step in range(place.reply))
    last = first + 1 + _cut(place, numbers, place.reply).count("\n")
    ask = Ask(
        f"Leave the text above aside. Write all whole numbers from {first} to {last}, "
        "each on a line of its own.",
        f"{first}\n{first + 1}\n",
        "The text above is the beginning of a novel.",
    )
    request = hide(place, novel("long-count", place), [], ask, reply=place.reply)
    return Sample(request, grade=Counted(first + 2, last))


def _cut(place: Place, text: str, tokens: int) -> str:
    """The beginning of a text, of so many tokens."""
    offsets = encode(place.tokenizer, text)[1][:tokens]
    return text[: offsets[-1][1]]


def _check(place: Place, needed: int) -> None:
    if place.reply < _LEAST or needed >= place.length:
        raise UserError(
            f"has no room for a reply of {place.reply} tokens; give a longer length, "
            f"or another --reply, of at least {_LEAST}"
        )
