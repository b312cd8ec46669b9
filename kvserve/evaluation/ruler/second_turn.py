# SPDX-License-Identifier: Apache-2.0
"""A second question on the cache that the first one left behind."""

from __future__ import annotations

from kvserve.errors import UserError
from kvserve.evaluation.prompts import (
    WORDS,
    Ask,
    content,
    hide,
    novel,
    rng_of,
    tokens_of,
)
from kvserve.evaluation.ruler.needles import (
    HIDDEN,
    ONE,
    QUESTION,
    numbers,
    sentences,
)
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.needles import chat


def second_turn(place: Place) -> Sample:
    """Two numbers: one is asked for and told, then the other is asked for.

    All after the first question is fed through decoding, so that the second question
    meets the cache that the first one left behind. In serving, a second turn sends the
    conversation again and reads it anew; this is what a cache that is kept would lose.
    """
    rng = rng_of("second-turn", place)
    words, values = rng.sample(WORDS, 2), numbers(rng, 2)
    first_depth = (place.depth + rng.uniform(0.25, 0.75)) % 1
    hidden = sentences(words, values, [first_depth, place.depth])
    first, second = (
        Ask(QUESTION.format(word=word), ONE.format(word=word), HIDDEN) for word in words
    )
    forced = _second_question(place, first, values[0], second)
    prose = novel("second-turn", place)
    request = hide(place, prose, hidden, first, reply=16, forced=forced, one_line=True)
    return Sample(request, (values[1],), place.depth)


def _second_question(place: Place, first: Ask, answer: str, second: Ask) -> list[int]:
    """Tokens from the first answer up to where the second is due."""
    tokenizer, turn = place.tokenizer, content("-", first)
    before = chat(tokenizer, turn, first.reply)
    if getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": "user", "content": turn},
            {"role": "assistant", "content": f"{first.reply} {answer}."},
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
    return tokens_of(tokenizer, whole.removeprefix(before))
