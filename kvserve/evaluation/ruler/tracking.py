# SPDX-License-Identifier: Apache-2.0
"""A value that is handed from variable to variable."""

from __future__ import annotations

import random
import string

from kvserve.evaluation.prompts import (
    Ask,
    draw_depths,
    hide,
    noise,
    novel,
    rng_of,
    worked_example,
)
from kvserve.evaluation.ruler.needles import numbers
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.haystack import insert

_HOPS = 4
_TOLD = "The text above has a chain of variable assignments."


def tracking(place: Place) -> Sample:
    """The chain in a novel."""
    rng = rng_of("tracking", place)
    names = _names(rng, 5)
    (value,) = numbers(rng, 1)
    hidden = list(zip(_chain(names, value), draw_depths(rng, len(names)), strict=True))
    prose = novel("tracking", place)
    request = hide(place, prose, hidden, _ask(names, value), reply=64)
    return Sample(request, tuple(names))


def vt(place: Place) -> Sample:
    """The chain among the same few sentences over and over, after a worked example."""
    rng = rng_of("vt", place)
    example = _example(rng, place)
    names = _names(rng, 5)
    (value,) = numbers(rng, 1)
    hidden = list(zip(_chain(names, value), draw_depths(rng, len(names)), strict=True))
    ask = _ask(names, value, example)
    return Sample(hide(place, noise(place), hidden, ask, reply=48), tuple(names))


def _example(rng: random.Random, place: Place) -> str:
    names = _names(rng, 3)
    (value,) = numbers(rng, 1)
    text = noise(place)[: place.length // 4]
    depths = draw_depths(rng, len(names))
    for sentence, depth in reversed([*zip(_chain(names, value), depths, strict=True)]):
        text, _ = insert(text, sentence, depth)
    return worked_example(text, _ask(names, value), " ".join(names), place)


def _names(rng: random.Random, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    return names


def _chain(names: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names)]
    return [
        f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)
    ]


def _ask(names: list[str], value: str, example: str = "") -> Ask:
    return Ask(
        f"Find all variables that are assigned the value {value} in the text above.",
        f"According to the chain of variable assignments in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        _TOLD,
        example,
    )
