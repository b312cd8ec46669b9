# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack: made-up facts hidden in prose, and questions about them.

What is hidden is up to a family (``families.py``); everything is drawn from a seed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvserve.errors import UserError
from kvserve.texts.haystack import Book, insert, load_book, passage


@dataclass(frozen=True)
class Wording:
    """One kind of needle; ``{slots}`` are filled from the family's word lists.

    A slot may carry a number (``{word1} {word2}``) to draw several distinct words.
    ``reply`` is put into the model's mouth: the answer continues it.
    """

    name: str
    sentence: str
    question: str
    answer: str
    reply: str = ""


@dataclass(frozen=True)
class Needle:
    """A fact that no model can know; ``sentence`` holds ``answer`` word for word."""

    wording: str
    sentence: str
    question: str
    answer: str
    reply: str = ""


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
            wording.reply.format(**slots),
        )


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt ready to be sent.

    Attributes:
        token_ids: The prompt with the chat template applied.
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
    question_first: bool = False,
) -> NeedlePrompt:
    """Hide needle ``index`` of ``family`` in ``num_tokens`` tokens of prose.

    Args:
        tokenizer: A fast tokenizer of ``transformers``.
        num_tokens: Length of the whole prompt. The result is never longer and at
            most a few tokens shorter.
        depth: Where the needle is hidden: 0 the beginning, 1 the end.
        index: Number of the needle; the passage of prose also depends on it.
        text: Prose to hide it in; ``None`` is the family's book.
        question_first: Ask ahead of the prose, not behind it.

    Raises:
        UserError: ``num_tokens`` leaves no room for prose, or the tokenizer cannot
            say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the model's tokenizer has no fast version: needles need one")
    needle = family.needle(index, seed)
    start = random.Random(f"passage/{family.name}/{seed}/{index}/{num_tokens}").random()
    prose = passage(text or load_book(family.book), start, 8 * num_tokens)
    prompt = fit(
        tokenizer,
        prose,
        num_tokens,
        lambda haystack: _assemble(tokenizer, haystack, needle, depth, question_first),
    )
    if prompt is None:
        raise UserError(
            f"a needle prompt does not fit in {num_tokens} tokens: use a longer length"
        )
    return prompt


class HasTokens(Protocol):
    """Text that has been tokenized."""

    @property
    def token_ids(self) -> list[int]: ...


_Tokens = TypeVar("_Tokens", bound=HasTokens)


def fit(
    tokenizer: Any, prose: str, num_tokens: int, render: Callable[[str], _Tokens]
) -> _Tokens | None:
    """Render as much of ``prose`` as fits in ``num_tokens``; ``None``: none does."""
    offsets = encode(tokenizer, prose)[1]
    keep = num_tokens
    while keep > 0:
        rendered = render(prose[: offsets[min(keep, len(offsets)) - 1][1]])
        excess = len(rendered.token_ids) - num_tokens
        if excess <= 0:
            return rendered
        keep -= excess
    return None


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


def _assemble(
    tokenizer: Any, prose: str, needle: Needle, depth: float, question_first: bool
) -> NeedlePrompt:
    context, _ = insert(prose, needle.sentence, depth)
    asked = f"{_INSTRUCTION}\nQuestion: {needle.question}"
    content = f"{context}\n\n{asked}"
    if question_first:
        content = f"{asked.replace('above', 'below')}\n\n{context}"
    rendered = chat(tokenizer, content, needle.reply)
    token_ids, offsets = encode(tokenizer, rendered)
    first = rendered.index(needle.sentence)
    answer = first + needle.sentence.index(needle.answer)
    return NeedlePrompt(
        token_ids,
        needle,
        _token_span(offsets, first, first + len(needle.sentence)),
        _token_span(offsets, answer, answer + len(needle.answer)),
    )


def chat(tokenizer: Any, content: str, reply: str = "") -> str:
    """Return the text of a user's turn and of the beginning of the reply.

    Tokenize it with :func:`encode`, which adds the special tokens of a model that has
    no chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": content}]
        prompt: str = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        return prompt + reply
    return f"{content}\nAnswer: {reply}".rstrip()


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize; return token ids and the characters ``[first, last)`` of each."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    encoded = tokenizer(
        text, add_special_tokens=not has_template, return_offsets_mapping=True
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
