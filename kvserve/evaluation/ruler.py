# SPDX-License-Identifier: Apache-2.0
"""Tasks in the manner of RULER (arXiv 2404.06654, section 3).

Their forms and sizes are RULER's; the prose is a novel instead of essays, names and
words are our own, and no word is in what head profiles are measured with.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import Request
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.families import MAGIC_NUMBERS
from kvserve.texts.haystack import DATA, insert, passage
from kvserve.texts.needles import build_prompt, chat, encode, fit

WORDS = tuple((DATA / "words.txt").read_text(encoding="utf-8").split())
_SENTENCE = "One of the special magic numbers for {word} is: {number}."
_QUESTION = "What are all the special magic numbers for {word} mentioned above?"
_ONE = "One of the special magic numbers for {word} is:"
_ALL = "The special magic numbers for {word} mentioned above are:"
_HIDDEN = "Some special magic numbers are hidden in the text above."

_KEYS = 4
_HOPS = 4
_COMMON, _TIMES = 10, 10


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
    )
    request = Request(prompt.token_ids, reply=reply, one_line=True)
    return Sample(request, (prompt.answer,), place.depth)


def multikey(place: Place) -> Sample:
    """Four keys of the same form, one of which is asked for."""
    rng = _rng("multikey", place)
    words, numbers = rng.sample(WORDS, _KEYS), _numbers(rng, _KEYS)
    depths = [place.depth, *_depths(rng, _KEYS - 1)]
    hidden = _sentences(words, numbers, depths)
    ask = _Question(_QUESTION.format(word=words[0]), _ONE.format(word=words[0]))
    request = _hide(place, "multikey", hidden, ask, reply=16, one_line=True)
    return Sample(request, (numbers[0],), place.depth)


def multivalue(place: Place) -> Sample:
    """Four numbers for the same key, all of which are asked for."""
    rng = _rng("multivalue", place)
    word, numbers = rng.choice(WORDS), _numbers(rng, _KEYS)
    hidden = _sentences([word] * _KEYS, numbers, _depths(rng, _KEYS))
    ask = _Question(_QUESTION.format(word=word), _ALL.format(word=word))
    return Sample(_hide(place, "multivalue", hidden, ask, reply=64), tuple(numbers))


def tracking(place: Place) -> Sample:
    """A value that is handed from variable to variable."""
    rng = _rng("tracking", place)
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] * (name not in names)
    (value,) = _numbers(rng, 1)
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [
        f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)
    ]
    hidden = list(zip(chain, _depths(rng, len(chain)), strict=True))
    ask = _Question(
        f"Find all variables that are assigned the value {value} in the text above.",
        f"According to the chain of variable assignments in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        "The text above has a chain of variable assignments.",
    )
    return Sample(_hide(place, "tracking", hidden, ask, reply=64), tuple(names))


def counting(place: Place) -> Sample:
    """A numbered list that fills the length; ten words are ten times as frequent."""
    rng = _rng("counting", place)
    reply = 64
    words = rng.sample(WORDS, len(WORDS))
    common, others = words[:_COMMON], words[_COMMON:]
    ask = _Question(
        f"What are the {_COMMON} most common words in the list above?",
        f"The {_COMMON} most common words in the list are:",
        "The text above is a numbered list of words. Some appear far more often than "
        "others. Memorize the ones that appear most often.",
    )
    order = rng.random()

    def render(entries: int) -> list[int]:
        listed = _frequent(common, others, entries)
        random.Random(order).shuffle(listed)
        text = " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
        return encode(place.tokenizer, _render(place.tokenizer, text, ask))[0]

    # A word of the list takes two tokens at the very least.
    least, most = _COMMON * _TIMES, place.length // 2
    room = place.length - reply
    if len(render(least)) > room:
        raise UserError("too short for a list of words; use a longer length")
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (
            (middle, most) if len(render(middle)) <= room else (least, middle - 1)
        )
    return Sample(Request(render(least), reply=reply), tuple(common))


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


def second_turn(place: Place) -> Sample:
    """Two numbers: one is asked for and told, then the other is asked for.

    All after the first question is fed through decoding, so that the second question
    meets the cache that the first one left behind. In serving, a second turn sends the
    conversation again and reads it anew; this is what a cache that is kept would lose.
    """
    rng = _rng("second-turn", place)
    words, numbers = rng.sample(WORDS, 2), _numbers(rng, 2)
    first_depth = (place.depth + rng.uniform(0.25, 0.75)) % 1
    hidden = _sentences(words, numbers, [first_depth, place.depth])
    first, second = (
        _Question(_QUESTION.format(word=word), _ONE.format(word=word)) for word in words
    )
    forced = _second_question(place.tokenizer, first, numbers[0], second)
    request = _hide(
        place, "second-turn", hidden, first, reply=16, forced=forced, one_line=True
    )
    return Sample(request, (numbers[1],), place.depth)


@dataclass(frozen=True)
class _Question:
    """What is asked, how the reply begins, and what the model is told of the text."""

    question: str
    reply: str
    told: str = _HIDDEN


def _rng(task: str, place: Place) -> random.Random:
    return random.Random(f"{task}/{place.seed}/{place.length}/{place.index}")


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _depths(rng: random.Random, count: int) -> list[float]:
    """Draw places in ascending order, one in each ``count``-th of the text."""
    return [(number + rng.random()) / count for number in range(count)]


def _sentences(
    words: Sequence[str], numbers: Sequence[str], depths: Sequence[float]
) -> list[tuple[str, float]]:
    return [
        (_SENTENCE.format(word=word, number=number), depth)
        for word, number, depth in zip(words, numbers, depths, strict=True)
    ]


def _hide(
    place: Place,
    task: str,
    hidden: list[tuple[str, float]],
    ask: _Question,
    *,
    reply: int,
    forced: list[int] | None = None,
    one_line: bool = False,
) -> Request:
    """Hide sentences in as much prose as the length has room for."""
    forced = forced or []
    room = place.length - reply - len(forced)
    start = _rng(f"passage/{task}", place).random()
    prose = passage(place.text, start, 8 * place.length)
    # The deepest goes in first, so that it does not shift the others.
    deepest_first = sorted(hidden, key=lambda one: -one[1])

    def render(haystack: str) -> _Tokens:
        for sentence, depth in deepest_first:
            haystack, _ = insert(haystack, sentence, depth)
        return _Tokens(
            encode(place.tokenizer, _render(place.tokenizer, haystack, ask))[0]
        )

    prompt = fit(place.tokenizer, prose, room, render)
    if prompt is None:
        raise UserError("too short for the question; use a longer length")
    return Request(
        prompt.token_ids, forced, reply, one_line=one_line, to_the_end=bool(forced)
    )


@dataclass(frozen=True)
class _Tokens:
    token_ids: list[int]


def _content(context: str, ask: _Question) -> str:
    return f"{context}\n\n{ask.told}\nQuestion: {ask.question}"


def _render(tokenizer: Any, context: str, ask: _Question) -> str:
    return chat(tokenizer, _content(context, ask), ask.reply)


def _second_question(
    tokenizer: Any, first: _Question, answer: str, second: _Question
) -> list[int]:
    """Tokens from the first answer up to where the second is due."""
    context = "-"
    before = _render(tokenizer, context, first)
    said = f"{first.reply} {answer}."
    if getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": "user", "content": _content(context, first)},
            {"role": "assistant", "content": said},
            {"role": "user", "content": f"Question: {second.question}"},
        ]
        whole: str = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        whole += second.reply
    else:
        whole = (
            f"{before} {answer}.\nQuestion: {second.question}\nAnswer: {second.reply}"
        )
    if not whole.startswith(before):
        raise UserError(
            "the model's chat template rewrites earlier turns; leave second-turn out"
        )
    rest = whole.removeprefix(before)
    return list(tokenizer(rest, add_special_tokens=False)["input_ids"])
