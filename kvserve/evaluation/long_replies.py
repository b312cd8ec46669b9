# SPDX-License-Identifier: Apache-2.0
"""Long replies: what a cache that evicts while it decodes can still say.

Both replies are known beforehand, so that a long one can be scored word by word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kvserve.errors import UserError
from kvserve.evaluation.prompts import Ask, hide, novel, rng_of
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.haystack import passage
from kvserve.texts.needles import encode

_RUN = 4
_LEAST = 32
_BEGIN, _END = "<copy>", "</copy>"


def in_order(expected: Sequence[str], said: Sequence[str], run: int = 1) -> float:
    """Share of ``expected`` that is said in its order.

    Args:
        run: items in a row that a match must have, so that a common word here and
            there is none.
    """
    matcher = SequenceMatcher(None, expected, said, autojunk=False)
    blocks = matcher.get_matching_blocks()
    return sum(one.size for one in blocks if one.size >= run) / len(expected)


@dataclass(frozen=True)
class Copied:
    """Share of a text's words that a reply repeats, four in a row at least."""

    text: str

    def __call__(self, reply: str) -> float:
        return in_order(self.text.split(), reply.split(), _RUN)


@dataclass(frozen=True)
class Counted:
    """Share of the numbers from ``first`` to ``last`` that come in their order."""

    first: int
    last: int

    def __call__(self, reply: str) -> float:
        expected = [str(number) for number in range(self.first, self.last + 1)]
        return in_order(expected, re.findall(r"\d+", reply))


def long_copy(place: Place) -> Sample:
    """A part of a novel to repeat word for word, as long as the reply."""
    _check(place, 2 * place.reply)
    start = rng_of("long-copy", place).random()
    prose = passage(place.text, start, 8 * place.length)
    # A reply's tokens may be cut in other places than the text's.
    text = _cut(place, prose, place.reply * 15 // 16).rsplit(" ", 1)[0]
    marked = f"\n\n{_BEGIN}\n{text}\n{_END}\n\n"
    ask = Ask(
        f"Repeat the part between {_BEGIN} and {_END} word for word.",
        f"{_BEGIN}\n",
        f"A part of the text above stands between {_BEGIN} and {_END}.",
    )
    around = novel("long-copy", place)
    request = hide(place, around, [(marked, place.depth)], ask, reply=place.reply)
    return Sample(request, (text,), place.depth, Copied(text))


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
