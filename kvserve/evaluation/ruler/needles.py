# SPDX-License-Identifier: Apache-2.0
"""Needles in haystacks: numbers, or identifiers, that belong to keys."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvserve.evaluation.backend import Request
from kvserve.evaluation.prompts import (
    WORDS,
    Ask,
    Hidden,
    draw_depths,
    fill,
    hide,
    noise,
    novel,
    rng_of,
)
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.families import MAGIC_NUMBERS
from kvserve.texts.needles import build_prompt

SENTENCE = "One of the special magic numbers for {word} is: {number}."
QUESTION = "What are all the special magic numbers for {word} mentioned above?"
ONE = "One of the special magic numbers for {word} is:"
_ALL = "The special magic numbers for {word} mentioned above are:"
HIDDEN = "Some special magic numbers are hidden in the text above."

_KEYS = 4
_REPLIES = {"numbers": 24, "uuids": 64}

Text = Literal["words", "numbers", "uuids"]


def needle(place: Place) -> Sample:
    """One number in a novel: the prompt of :func:`needles.build_prompt`."""
    reply = 16
    prompt = build_prompt(
        place.tokenizer,
        MAGIC_NUMBERS,
        place.length - reply,
        place.depth,
        place.index,
        seed=place.seed,
        text=place.text,
        question_first=place.question_first,
    )
    request = Request(prompt.token_ids, reply=reply, one_line=True)
    return Sample(request, (prompt.answer,), place.depth)


def multikey(place: Place) -> Sample:
    """Four keys of the same form, one of which is asked for."""
    rng = rng_of("multikey", place)
    words, values = rng.sample(WORDS, _KEYS), numbers(rng, _KEYS)
    depths = [place.depth, *draw_depths(rng, _KEYS - 1)]
    hidden = sentences(words, values, depths)
    ask = Ask(QUESTION.format(word=words[0]), ONE.format(word=words[0]), HIDDEN)
    prose = novel("multikey", place)
    request = hide(place, prose, hidden, ask, reply=16, one_line=True)
    return Sample(request, (values[0],), place.depth)


def multivalue(place: Place) -> Sample:
    """Four numbers for the same key, all of which are asked for."""
    rng = rng_of("multivalue", place)
    word, values = rng.choice(WORDS), numbers(rng, _KEYS)
    hidden = sentences([word] * _KEYS, values, draw_depths(rng, _KEYS))
    ask = Ask(QUESTION.format(word=word), _ALL.format(word=word), HIDDEN)
    request = hide(place, novel("multivalue", place), hidden, ask, reply=64)
    return Sample(request, tuple(values))


@dataclass(frozen=True)
class Niah:
    """A task of RULER's needle-in-a-haystack family, by RULER's own parameters.

    Attributes:
        name: the task's.
        haystack: what needles hide in; ``needles`` are other needles.
        keys: that are hidden in prose.
        values: of each key.
        asked: keys that are asked for.
        key, value: what they are made of.
    """

    name: str
    haystack: Literal["noise", "novel", "needles"] = "novel"
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Text = "words"
    value: Text = "numbers"

    @property
    def has_depth(self) -> bool:
        """Whether the answer lies in one place."""
        return self.values * self.asked == 1

    def __call__(self, place: Place) -> Sample:
        rng = rng_of(self.name, place)
        if self.haystack == "needles":
            return self._among_needles(place, rng)
        pairs = [
            (key, value)
            for key in _draw(rng, self.key, self.keys)
            for value in _draw(rng, self.value, self.values)
        ]
        asked = pairs[: self.asked * self.values]
        depths = draw_depths(rng, len(pairs))
        if self.has_depth:
            depths = [place.depth, *depths[1:]]
        else:
            rng.shuffle(depths)
        hidden = [
            (self._sentence(*pair), at) for pair, at in zip(pairs, depths, strict=True)
        ]
        prose = noise(place) if self.haystack == "noise" else novel(self.name, place)
        keys = list(dict.fromkeys(key for key, _ in asked))
        reply = self._reply(len(asked))
        request = hide(place, prose, hidden, self._ask(keys), reply=reply)
        depth = place.depth if self.has_depth else None
        return Sample(request, tuple(value for _, value in asked), depth)

    def _among_needles(self, place: Place, rng: random.Random) -> Sample:
        # A needle takes ten tokens at the very least.
        most = max(min(place.length // 10, _PAIRS), 1)
        keys, values = _draw(rng, self.key, most), _draw(rng, self.value, most)
        first, *others = zip(keys, values, strict=True)
        lines = [self._sentence(*pair) for pair in others]

        def context(count: int) -> str:
            at = round(place.depth * (count - 1))
            return "\n".join(
                [*lines[:at], self._sentence(*first), *lines[at : count - 1]]
            )

        request = fill(
            place,
            context,
            self._ask([first[0]]),
            bounds=(2, most),
            what="two needles",
            reply=self._reply(1),
        )
        return Sample(request, (first[1],), place.depth)

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _ask(self, keys: Sequence[str]) -> Ask:
        told = f"Some special magic {self.value} are hidden in the text above."
        if self.values * len(keys) == 1:
            one = f"special magic {self.value[:-1]} for {keys[0]}"
            return Ask(f"What is the {one} mentioned above?", f"The {one} is:", told)
        names = ", ".join(keys[:-1]) + " and " * (len(keys) > 1) + keys[-1]
        what = f"special magic {self.value} for {names}"
        question = f"What are all the {what} mentioned above?"
        return Ask(question, f"The {what} mentioned above are:", told)

    def _reply(self, answers: int) -> int:
        return _REPLIES[self.value] * answers


NIAH = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2"),
    Niah("niah_single_3", value="uuids"),
    Niah("niah_multikey_1", keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", key="uuids", value="uuids"),
    Niah("niah_multivalue", values=4),
    Niah("niah_multiquery", keys=4, asked=4),
)


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def sentences(
    words: Sequence[str], values: Sequence[str], depths: Sequence[float]
) -> Hidden:
    """What is hidden: a number for each word."""
    return [
        (SENTENCE.format(word=word, number=value), depth)
        for word, value, depth in zip(words, values, depths, strict=True)
    ]


_PAIRS = len(WORDS) * (len(WORDS) - 1)


def _draw(rng: random.Random, kind: Text, count: int) -> list[str]:
    """Different keys or values: two words, seven digits, or 32 hexadecimal ones."""
    if kind == "uuids":
        drawn = (rng.getrandbits(128) for _ in range(count))
        return [str(uuid.UUID(int=bits, version=4)) for bits in drawn]
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(10**6, 10**7), count)]
    found = []
    for pair in rng.sample(range(_PAIRS), count):
        first, second = divmod(pair, len(WORDS) - 1)
        found.append(f"{WORDS[first]}-{WORDS[second + (second >= first)]}")
    return found
