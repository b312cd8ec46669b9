# SPDX-License-Identifier: Apache-2.0
"""Contexts with hidden numbers, and questions that each follow a context alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvserve.texts.families import FACTS, MAGIC_NUMBERS
from kvserve.texts.haystack import insert, load_book, passage
from kvserve.texts.needles import Needle, encode, fit

KEYS = 8
"""Numbers in each context."""
_TOLD = "Some made-up facts are hidden in the text above."


@dataclass(frozen=True)
class Case:
    """A context, and questions that each follow it alone.

    Attributes:
        tokens: The context's, then those of all questions with their answers.
        context: Tokens of the context.
        ends: Where each question, its answer included, ends.
        answers: Tokens of each answer, the last ones of its question.
        text: What lies in the context.
    """

    tokens: list[int]
    context: int
    ends: list[int]
    answers: list[int]
    text: str

    @property
    def questions(self) -> Iterator[tuple[int, int]]:
        yield from zip([self.context, *self.ends], self.ends, strict=False)

    @property
    def positions(self) -> Tensor:
        """Every question begins where the context ends."""
        parts = [torch.arange(self.context)]
        parts += [self.context + torch.arange(b - a) for a, b in self.questions]
        return torch.cat(parts)


def build_case(tokenizer: Any, length: int, index: int) -> Case:
    """Hide numbers in a context of about ``length`` tokens, questions included."""
    rng = random.Random(f"thinning/{length}/{index}")
    needles = _needles(rng)
    prose = passage(load_book("persuasion"), rng.random(), 8 * length)
    depths = [(key + rng.random()) / KEYS for key in range(KEYS)]
    others = needles[1:] + needles[:1]

    def render(text: str) -> _Rendered:
        for needle, depth in reversed([*zip(needles, depths, strict=True)]):
            text, _ = insert(text, needle.sentence, depth)
        turns = [[needle] for needle in needles]
        turns += [[*pair] for pair in zip(others, needles, strict=True)]
        asked = [_ask(tokenizer, text, one) for one in turns]
        return _Rendered(text, [encode(tokenizer, one)[0] for one in asked])

    rendered = fit(tokenizer, prose, length, render)
    assert rendered is not None
    answers = [
        list(tokenizer(f" {needle.answer}", add_special_tokens=False)["input_ids"])
        for needle in needles * 2
    ]
    context = _common(rendered.asked)
    tokens, ends = rendered.asked[0][:context], []
    for asked, answer in zip(rendered.asked, answers, strict=True):
        tokens = tokens + asked[context:] + answer
        ends.append(len(tokens))
    return Case(tokens, context, ends, [*map(len, answers)], rendered.text)


@dataclass(frozen=True)
class _Rendered:
    text: str
    asked: list[list[int]]

    @property
    def token_ids(self) -> list[int]:
        return self.asked[0]


def _needles(rng: random.Random) -> list[Needle]:
    """Draw needles that hide a number each, as many of every wording."""
    wordings = [*MAGIC_NUMBERS.wordings]
    wordings += [one for one in FACTS.wordings if one.answer == "{number}"]
    found: dict[str, Needle] = {}
    while len(found) < KEYS:
        wording = wordings[len(found) % len(wordings)]
        family = replace(FACTS, wordings=(wording,))
        needle = family.needle(0, seed=rng.randrange(1 << 20))
        found.setdefault(needle.question, needle)
    return rng.sample([*found.values()], KEYS)


def _begun(needle: Needle) -> str:
    return needle.sentence[: needle.sentence.index(needle.answer)].rstrip()


def _ask(tokenizer: Any, text: str, turns: list[Needle]) -> str:
    """Render a conversation about ``text`` up to where the last answer is due."""
    messages = []
    for number, needle in enumerate(turns):
        question = f"Question: {needle.question}"
        content = question if number else f"{text}\n\n{_TOLD}\n{question}"
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": needle.sentence},
        ]
    rendered: str = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    return rendered + _begun(turns[-1])


def _common(sequences: list[list[int]]) -> int:
    """Length of the prefix that all have in common."""
    columns = enumerate(zip(*sequences, strict=False))
    return next(place for place, column in columns if len(set(column)) > 1)
