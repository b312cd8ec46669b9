# SPDX-License-Identifier: Apache-2.0
"""Rules of a system prompt: how they are checked, and where they stand."""

from __future__ import annotations

from typing import Any

import pytest

from kvserve.evaluation.catalogue import built_in
from kvserve.evaluation.instructions import Followed, Instruction, Kept
from kvserve.evaluation.tasks import Sample
from kvserve.texts.haystack import load_book
from tests.unit.byte_tokenizer import byte_tokenizer

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
)


def tokenizer_of(template: str | None) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def made(name: str, tokenizer: Any, count: int = 4) -> list[Sample]:
    task = built_in()[name]
    return task.samples(tokenizer, load_book("persuasion"), 0, 1500, count)


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("capitals", "", "IT IS 1 NOVEL.", "It is a novel."),
        ("begins", "maple", "- Maple: a novel", "A maple"),
        ("ends", "maple", "It is a maple.", "maple tree"),
        ("contains", "maple", "A MAPLE here", "maples"),
        ("thrice", "maple", "maple maple, maple", "maple maple maple maple"),
        ("number", "1234", "It has 1234 words", "It has 12345 words"),
        ("short", "3", "A short novel.", "A rather short novel."),
        ("list", "", "- one\n\n - two", "- one\ntwo"),
    ],
)
def test_every_rule_is_checked_by_program(
    kind: str, value: str, good: str, bad: str
) -> None:
    rule = Instruction(kind, value)
    assert rule.is_followed(good)
    assert not rule.is_followed(bad)
    assert not rule.is_followed(" \n")
    assert value in rule.text


def test_the_score_is_the_share_of_rules_that_were_followed() -> None:
    grade = Followed((Instruction("capitals"), Instruction("short", "2")))
    assert (grade("A NOVEL"), grade("A NOVEL OF TWO"), grade("a novel of")) == (
        1,
        0.5,
        0,
    )


def test_a_secret_is_told_when_all_its_words_are() -> None:
    grade = Kept("maple-otter")
    assert grade("I must not tell.") == 1
    assert grade("It is not maple.") == 1
    assert grade("It is Maple Otter") == 0


@pytest.mark.parametrize("name", ["instructions", "leak"])
def test_the_system_prompt_stands_before_the_text(name: str) -> None:
    for sample in made(name, tokenizer_of(TURNS)):
        text = tokenizer_of(None).decode(sample.request.prompt)
        assert text.startswith("[system]")
        assert text.index("[user]") < 600
        assert text.rstrip().endswith("[assistant]")
        assert sample.request.tokens == pytest.approx(1500, abs=8)


@pytest.mark.parametrize("template", [None, NO_SYSTEM + TURNS])
def test_a_model_without_system_prompts_gets_the_rules_with_the_text(
    template: str | None,
) -> None:
    for sample in made("instructions", tokenizer_of(template)):
        text = tokenizer_of(None).decode(sample.request.prompt)
        assert "[system]" not in text
        assert "Follow every one of these rules" in text[:60]


@pytest.mark.parametrize("name", ["instructions", "leak", "system-facts"])
def test_what_belongs_to_the_system_prompt_ends_where_the_text_begins(
    name: str,
) -> None:
    for sample in made(name, tokenizer_of(TURNS)):
        tokens = sample.request.prompt[: sample.request.system]
        text = tokenizer_of(None).decode(tokens)
        assert text.startswith("[system]")
        assert text.endswith("\n[user]")


def test_a_model_without_system_prompts_has_the_rules_spared_all_the_same() -> None:
    for sample in made("instructions", tokenizer_of(NO_SYSTEM + TURNS)):
        tokens = sample.request.prompt[: sample.request.system]
        assert isinstance(sample.grade, Followed)
        text = tokenizer_of(None).decode(tokens)
        assert all(one.text in text for one in sample.grade.given)


def test_one_of_the_facts_is_asked_for_and_its_reply_is_begun() -> None:
    for sample in made("system-facts", tokenizer_of(TURNS)):
        text = tokenizer_of(None).decode(sample.request.prompt)
        (answer,) = sample.answers
        begun = text.splitlines()[-1].removeprefix("[assistant]")
        assert text[: text.index("[user]")].count(f"{begun} {answer}.") == 1
        assert text[: text.index("[user]")].count("The special magic number") == 8
        assert text.count(answer) == 1


def test_rules_of_a_prompt_are_four_that_are_given_in_its_words() -> None:
    for sample in made("instructions", tokenizer_of(TURNS), count=12):
        text = tokenizer_of(None).decode(sample.request.prompt)
        assert isinstance(sample.grade, Followed)
        assert len({one.kind for one in sample.grade.given}) == 4
        assert all(one.text in text for one in sample.grade.given)
