# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: made-up facts hidden in prose, and questions about them.

There are two disjoint families. Head profiles are measured with ``PROFILING``,
quality with ``EVALUATION``: no wording, name, word or haystack is in both, so that a
profile cannot look good because it saw the test. Everything is drawn from a seed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.haystack import Book, insert, load_book, passage


@dataclass(frozen=True)
class Wording:
    """One kind of needle; ``{slots}`` are filled from the family's word lists.

    A slot may carry a number (``{word1} {word2}``) to draw several distinct words.
    """

    name: str
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Needle:
    """A fact that no model can know; ``sentence`` holds ``answer`` word for word."""

    wording: str
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Family:
    """A set of wordings, the words they draw from and the prose they hide in."""

    name: str
    book: Book
    wordings: tuple[Wording, ...]
    words: dict[str, tuple[str, ...]]

    def needle(self, index: int, seed: int = 0) -> Needle:
        """Return needle ``index``: wordings take turns, their words are drawn anew."""
        wording = self.wordings[index % len(self.wordings)]
        rng = random.Random(f"{self.name}/{seed}/{index}")
        slots = _draw(wording, self.words, rng)
        return Needle(
            wording.name,
            wording.sentence.format(**slots),
            wording.question.format(**slots),
            wording.answer.format(**slots),
        )


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt ready to be sent.

    Attributes:
        token_ids: The prompt with the chat template applied, the question at its end.
        needle_span: ``[start, end)`` of the hidden sentence in ``token_ids``.
        answer_span: ``[start, end)`` of the answer inside that sentence.
    """

    token_ids: list[int]
    needle: Needle
    needle_span: tuple[int, int]
    answer_span: tuple[int, int]

    @property
    def answer(self) -> str:
        return self.needle.answer


def build_prompt(
    tokenizer: Any,
    family: Family,
    num_tokens: int,
    depth: float,
    index: int,
    *,
    seed: int = 0,
    text: str | None = None,
) -> NeedlePrompt:
    """Hide needle ``index`` of ``family`` in ``num_tokens`` tokens of prose.

    Args:
        tokenizer: A fast tokenizer of ``transformers``.
        num_tokens: Length of the whole prompt. The result is never longer and at
            most a few tokens shorter.
        depth: Where the needle is hidden: 0 the beginning, 1 the end.
        index: Number of the needle; the passage of prose also depends on it.
        text: Prose to hide it in; ``None`` is the family's book.

    Raises:
        UserError: ``num_tokens`` leaves no room for prose, or the tokenizer cannot
            say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the model's tokenizer has no fast version: needles need one")
    needle = family.needle(index, seed)
    start = random.Random(f"passage/{family.name}/{seed}/{index}/{num_tokens}").random()
    prose = passage(text or load_book(family.book), start, 8 * num_tokens)
    offsets = _encode(tokenizer, prose)[1]
    keep = num_tokens
    while keep > 0:
        cut = offsets[min(keep, len(offsets)) - 1][1]
        prompt = _assemble(tokenizer, prose[:cut], needle, depth)
        excess = len(prompt.token_ids) - num_tokens
        if excess <= 0:
            return prompt
        keep -= excess
    raise UserError(
        f"a needle prompt does not fit in {num_tokens} tokens: use a longer length"
    )


def score(answer: str, response: str) -> float:
    """Return the share of the answer's words that the response contains, 0 to 1.

    This is ROUGE-1 recall over content words: function words would let an unrelated
    response score. A number counts as one word: all its digits or nothing.
    """
    expected = _content_words(answer)
    found = expected & _content_words(response)
    return found.total() / expected.total()


def _content_words(text: str) -> Counter[str]:
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=\d),(?=\d)", "", text.lower()))
    return Counter(word for word in words if word not in _FUNCTION_WORDS)


def _draw(
    wording: Wording, words: dict[str, tuple[str, ...]], rng: random.Random
) -> dict[str, str]:
    names = dict.fromkeys(re.findall(r"{(\w+)}", wording.sentence))
    slots: dict[str, str] = {}
    for name in names:
        kind = name.rstrip("0123456789")
        if kind == "number":
            slots[name] = str(rng.randrange(10_000, 100_000))
            continue
        taken = set(slots.values())
        slots[name] = rng.choice([word for word in words[kind] if word not in taken])
    return slots


def _assemble(tokenizer: Any, prose: str, needle: Needle, depth: float) -> NeedlePrompt:
    context, _ = insert(prose, needle.sentence, depth)
    content = f"{context}\n\n{_INSTRUCTION}\nQuestion: {needle.question}"
    if getattr(tokenizer, "chat_template", None):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
        )
        token_ids, offsets = _encode(tokenizer, rendered)
    else:
        rendered = f"{content}\nAnswer:"
        token_ids, offsets = _encode(tokenizer, rendered, add_special_tokens=True)
    first = rendered.index(needle.sentence)
    answer = first + needle.sentence.index(needle.answer)
    return NeedlePrompt(
        token_ids,
        needle,
        _token_span(offsets, first, first + len(needle.sentence)),
        _token_span(offsets, answer, answer + len(needle.answer)),
    )


def _encode(
    tokenizer: Any, text: str, add_special_tokens: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
    )
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _token_span(
    offsets: list[tuple[int, int]], first: int, last: int
) -> tuple[int, int]:
    """Return the tokens that cover any of the characters ``[first, last)``."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    return inside[0], inside[-1] + 1


_INSTRUCTION = "Answer the question with the words of the text above."

_FUNCTION_WORDS = frozenset(
    {"a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on"}
    | {"or", "the", "to", "was", "with"}
)

_PROFILING_WORDS = {
    "city": ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Cairo", "Lima", "Seoul"),
    "name": ("Arthur", "Beatrice", "Clement", "Dorothea", "Edmund", "Flora"),
    "surname": ("Hollis", "Marchetti", "Okafor", "Pemberton", "Quist", "Rasmussen"),
    "colour": ("green", "yellow", "purple", "silver", "orange", "white"),
    "thing": ("umbrella", "violin", "lantern", "trumpet", "compass", "saddle"),
    "food": ("melon", "cheese", "pepper", "walnuts", "honey", "rice", "spinach"),
    "room": ("kitchen", "cellar", "library", "stable", "chapel", "attic"),
    "place": ("cupboard", "staircase", "barrel", "piano", "carpet", "fireplace"),
    "animal": ("tiger", "parrot", "camel", "otter", "donkey", "penguin"),
}

_EVALUATION_WORDS = {
    "city": ("Prague", "Bogota", "Manila", "Dakar", "Vienna", "Tunis", "Havana"),
    "name": ("Gregory", "Harriet", "Ivan", "Josephine", "Leonard", "Matilda"),
    "surname": ("Abernathy", "Castellano", "Dupont", "Fitzroy", "Gunderson"),
    "object": ("safe", "locker", "garage", "vault", "elevator", "warehouse"),
    "word": ("basket", "copper", "dolphin", "engine", "forest", "guitar", "island"),
    "job": ("baker", "plumber", "dentist", "pilot", "carpenter", "librarian"),
    "drink": ("lemonade", "cocoa", "buttermilk", "cider", "ginger ale"),
    "spice": ("mustard", "cinnamon", "vanilla", "nutmeg", "paprika"),
    "machine": ("tractor", "submarine", "balloon", "telescope", "bicycle"),
}

PROFILING = Family(
    "profiling",
    "northanger_abbey",
    (
        Wording(
            "secret number",
            "The secret number of {city} is {number}.",
            "What is the secret number of {city}?",
            "{number}",
        ),
        Wording(
            "ship",
            "The ship called the {colour} {animal} carries {food1}, {food2} and "
            "{food3}.",
            "What does the ship called the {colour} {animal} carry?",
            "{food1}, {food2} and {food3}",
        ),
        Wording(
            "best thing",
            "The best thing to do in {city} is to eat {food} and look for the "
            "{colour} {animal} behind the {room}.",
            "What is the best thing to do in {city}?",
            "eat {food} and look for the {colour} {animal} behind the {room}",
        ),
        Wording(
            "hidden thing",
            "The {colour} {thing} of {name} {surname} is hidden under the {place} in "
            "the {room}.",
            "Where is the {colour} {thing} of {name} {surname} hidden?",
            "under the {place} in the {room}",
        ),
        Wording(
            "soup",
            "The famous soup of {city} is made of {food1}, {food2} and {food3}.",
            "What is the famous soup of {city} made of?",
            "{food1}, {food2} and {food3}",
        ),
        Wording(
            "trainer",
            "The name of the man who trains the {animal} of {city} is {name} "
            "{surname}.",
            "What is the name of the man who trains the {animal} of {city}?",
            "{name} {surname}",
        ),
        Wording(
            "telephone",
            "The telephone number of the {animal} club is {number}.",
            "What is the telephone number of the {animal} club?",
            "{number}",
        ),
    ),
    _PROFILING_WORDS,
)

EVALUATION = Family(
    "evaluation",
    "persuasion",
    (
        Wording(
            "magic number",
            "The special magic number for {city} is {number}.",
            "What is the special magic number for {city}?",
            "{number}",
        ),
        Wording(
            "access code",
            "The access code for the {object} of Mr. {surname} is {number}.",
            "What is the access code for the {object} of Mr. {surname}?",
            "{number}",
        ),
        Wording(
            "job",
            "{name} {surname} works as a {job} in {city}.",
            "What does {name} {surname} work as, and in which city?",
            "{job} in {city}",
        ),
        Wording(
            "password",
            "The password for the {machine} is {word1} {word2} {word3}.",
            "What is the password for the {machine}?",
            "{word1} {word2} {word3}",
        ),
        Wording(
            "drink",
            "The favourite drink of {name} {surname} is {drink} with {spice1} and "
            "{spice2}.",
            "What is the favourite drink of {name} {surname}?",
            "{drink} with {spice1} and {spice2}",
        ),
        Wording(
            "gift",
            "The birthday gift for {name} {surname} is a {machine} and a {word}.",
            "What is the birthday gift for {name} {surname}?",
            "a {machine} and a {word}",
        ),
        Wording(
            "flight",
            "The flight number of the plane to {city} is {number}.",
            "What is the flight number of the plane to {city}?",
            "{number}",
        ),
    ),
    _EVALUATION_WORDS,
)
