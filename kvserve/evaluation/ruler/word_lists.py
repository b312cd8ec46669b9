# SPDX-License-Identifier: Apache-2.0
"""The commonest words of lists that fill the length."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import string

from kvserve.evaluation.prompts import (
    WORDS,
    Ask,
    fill,
    render,
    rng_of,
    worked_example,
)
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.haystack import load_book

_COMMON, _TIMES = 10, 10
_FULL_SIZE = 4096
_LEAST_TOKENS = 2
"""Of a word of the list and its number."""
_ZIPF = 2.0
_LETTERS = 6


def counting(place: Place) -> Sample:
    """A numbered list of words, ten of which are ten times as frequent as others."""
    rng = rng_of("counting", place)
    words = rng.sample(WORDS, len(WORDS))
    common, others = words[:_COMMON], words[_COMMON:]
    order = rng.random()

    def context(entries: int) -> str:
        return _numbered(_frequent(common, others, entries), order)

    request = fill(
        place,
        context,
        _ask(),
        bounds=(_COMMON * _TIMES, place.length // _LEAST_TOKENS),
        what="a list of words",
        reply=64,
    )
    return Sample(request, tuple(common))


def _frequent(common: list[str], others: list[str], entries: int) -> list[str]:
    """List about ``entries`` words, two thirds of them the common ones."""
    times = max(entries * 2 // 3 // len(common), _TIMES)
    listed = common * times
    least = times // _TIMES
    for word in others:
        if len(listed) + least > entries:
            break
        listed += [word] * least
    return listed


def cwe(place: Place) -> Sample:
    """A list with RULER's frequencies, after a worked example.

    Ten words come 30 times and all others 3 times, below 4096 tokens 6 times and once.
    Where the length has room for more words than there are, all come twice as often,
    or thrice.
    """
    rng = rng_of("cwe", place)
    short = place.length < _FULL_SIZE
    often, seldom = (6, 1) if short else (30, 3)
    words = rng.sample(_vocabulary(), len(_vocabulary()))
    common, others = words[:_COMMON], words[_COMMON:]
    ask = _ask(_example(rng, place, short))
    order, room = rng.random(), place.length - 96

    def context(count: int, factor: int) -> str:
        listed = [*common * often * factor, *others[:count] * seldom * factor]
        return _numbered(listed, order)

    def has_room_for_all(factor: int) -> bool:
        entries = (len(common) * often + len(others) * seldom) * factor
        if _LEAST_TOKENS * entries > room:
            return False
        whole = render(place, context(len(others), factor), ask)
        return len(whole.token_ids) <= room

    factor = next(n for n in itertools.count(1) if not has_room_for_all(n))
    request = fill(
        place,
        functools.partial(context, factor=factor),
        ask,
        bounds=(1, min(len(others), room // (_LEAST_TOKENS * seldom * factor))),
        what="a list of words",
        reply=96,
    )
    return Sample(request, tuple(common))


def _example(rng: random.Random, place: Place, short: bool) -> str:
    """A list of 20 words, or of 40, with its answer."""
    size, often, seldom = (20, 3, 1) if short else (40, 10, 3)
    words = rng.sample(_vocabulary(), size)
    common, others = words[:_COMMON], words[_COMMON:]
    text = _numbered(common * often + others * seldom, rng.random())
    return worked_example(text, _ask(), _join(common), place)


def _numbered(listed: list[str], order: float) -> str:
    random.Random(order).shuffle(listed)
    return _join(listed)


def _join(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _ask(example: str = "") -> Ask:
    return Ask(
        f"What are the {_COMMON} most common words in the list above?",
        f"The {_COMMON} most common words in the list are:",
        "The text above is a numbered list of words. Some appear far more often than "
        "others. Memorize the ones that appear most often.",
        example,
    )


@functools.cache
def _vocabulary() -> list[str]:
    """Our own words, and those that a novel writes in small letters."""
    written = re.findall(r"\b[a-z]{4,10}\b", load_book("persuasion"))
    return sorted({*WORDS, *written})


def fwe(place: Place) -> Sample:
    """Made-up words, as frequent as Zipf's law says with an exponent of 2.

    Dots stand for the most frequent; the three that follow are asked for.
    """
    rng = rng_of("fwe", place)
    reply = 48
    vocabulary: list[str] = []
    while len(vocabulary) < max((place.length - reply) // 50, 8):
        word = "".join(rng.choices(string.ascii_lowercase, k=_LETTERS))
        vocabulary += [word] * (word not in vocabulary)
    order = rng.random()
    ask = Ask(
        "What are the three most frequent words of the coded text above? Leave the "
        "dots out, and explain nothing.",
        "The three most frequent words of the coded text are:",
        "The text above is made of coded words. Keep track of how often each appears.",
    )

    def context(count: int) -> str:
        listed = _zipf(["...", *vocabulary], count)
        random.Random(order).shuffle(listed)
        return " ".join(listed)

    request = fill(
        place,
        context,
        ask,
        bounds=(100, place.length),
        what="a coded text",
        reply=reply,
    )
    return Sample(request, tuple(vocabulary[:3]))


def _zipf(words: list[str], count: int) -> list[str]:
    """About ``count`` words, the n-th of them as often as n to the minus second."""
    whole = math.pi**2 / 6
    return [
        word
        for rank, word in enumerate(words, 1)
        for _ in range(int(count / whole / rank**_ZIPF))
    ]
