# SPDX-License-Identifier: Apache-2.0
"""Needle prompts: what is hidden where, and how answers are scored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.texts.families import FACTS, MAGIC_NUMBERS, PROFILING
from kvserve.texts.haystack import insert, load_book, load_text, passage
from kvserve.texts.needles import Family, build_prompt, score
from tests.unit.byte_tokenizer import byte_tokenizer

FAMILIES = pytest.mark.parametrize(
    "family", [PROFILING, FACTS, MAGIC_NUMBERS], ids=lambda family: family.name
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@FAMILIES
def test_every_wording_is_used_and_hides_its_answer_once(family: Family) -> None:
    needles = [family.needle(index) for index in range(70)]
    assert len({needle.wording for needle in needles}) == len(family.wordings)
    for needle in needles:
        assert needle.sentence.count(needle.answer) == 1
        assert needle.answer not in needle.question
        assert needle.answer not in needle.reply
        assert "{" not in needle.sentence + needle.question + needle.reply


@FAMILIES
def test_needles_are_drawn_from_the_seed_alone(family: Family) -> None:
    assert family.needle(5, seed=1) == family.needle(5, seed=1)
    drawn = {family.needle(0, seed=seed).answer for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize("other", [FACTS, MAGIC_NUMBERS], ids=lambda one: one.name)
def test_profiles_share_no_wording_word_or_book_with_quality(other: Family) -> None:
    assert PROFILING.book != other.book
    lists = [
        {word for words in family.words.values() for word in words}
        for family in (PROFILING, other)
    ]
    assert not lists[0] & lists[1]
    sentences = [
        {re.sub(r"{.*?}", "", one.sentence) for one in family.wordings}
        for family in (PROFILING, other)
    ]
    assert not sentences[0] & sentences[1]


@FAMILIES
def test_every_slot_list_of_a_family_is_used(family: Family) -> None:
    used = {
        name.rstrip("0123456789")
        for one in family.wordings
        for name in re.findall(r"{(\w+)}", one.sentence)
    }
    assert used - {"number"} == set(family.words)


@FAMILIES
@pytest.mark.parametrize("num_tokens", [600, 1400])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_prompt_has_the_length_asked_for_and_ends_with_the_question(
    tokenizer: Any, family: Family, num_tokens: int, depth: float
) -> None:
    prompt = build_prompt(tokenizer, family, num_tokens, depth, index=3)
    assert num_tokens - 8 <= len(prompt.token_ids) <= num_tokens
    text = tokenizer.decode(prompt.token_ids)
    answer = f"\nAnswer: {prompt.needle.reply}".rstrip()
    assert text.endswith(prompt.needle.question + answer)


@pytest.mark.parametrize("index", range(7))
def test_spans_cover_the_needle_and_the_answer(tokenizer: Any, index: int) -> None:
    prompt = build_prompt(tokenizer, FACTS, 1000, 0.5, index)
    needle = tokenizer.decode(prompt.token_ids[slice(*prompt.needle_span)])
    answer = tokenizer.decode(prompt.token_ids[slice(*prompt.answer_span)])
    assert needle == prompt.needle.sentence
    assert answer == prompt.answer


def test_a_deeper_needle_comes_later(tokenizer: Any) -> None:
    spans = [
        build_prompt(tokenizer, PROFILING, 1500, depth, 0).needle_span
        for depth in (0.0, 0.3, 0.6, 1.0)
    ]
    assert spans == sorted(spans)
    assert spans[0][0] == 0
    assert spans[-1][0] > 700


def test_equal_arguments_give_equal_prompts_and_other_needles_other_prose(
    tokenizer: Any,
) -> None:
    one, again, other = (
        build_prompt(tokenizer, PROFILING, 900, 1.0, index) for index in (2, 2, 3)
    )
    assert one == again
    assert one.token_ids[:100] != other.token_ids[:100]


def test_the_chat_template_is_applied_when_there_is_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = build_prompt(tokenizer, PROFILING, 800, 0.5, 0)
    text = tokenizer.decode(prompt.token_ids)
    assert text.startswith("[user]")
    assert text.endswith("[end][assistant]")
    answer = tokenizer.decode(prompt.token_ids[slice(*prompt.answer_span)])
    assert answer == prompt.answer


def test_a_length_without_room_for_prose_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="does not fit in 60 tokens"):
        build_prompt(tokenizer, PROFILING, 60, 0.5, 0)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast"):
        build_prompt(Slow(), PROFILING, 600, 0.5, 0)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("48213", "The secret number is 48213.", 1.0),
        ("48213", "It is 48,213", 1.0),
        ("48213", "It is 4821", 0.0),
        ("48213", "It is 482130", 0.0),
        ("under the piano in the attic", "UNDER a piano", 2 / 3),
        ("under the piano in the attic", "in the and of", 0.0),
        ("rice, honey and rice", "rice", 1 / 3),
        ("a balloon and a forest", "", 0.0),
    ],
)
def test_the_score_is_the_recall_of_content_words(
    answer: str, response: str, expected: float
) -> None:
    assert score(answer, response) == pytest.approx(expected)


@FAMILIES
def test_the_right_answer_scores_one_and_another_needles_less(family: Family) -> None:
    for index in range(21):
        needle = family.needle(index)
        assert score(needle.answer, needle.sentence) == 1.0
        assert score(needle.answer, needle.question) < 1.0


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(500, 200_000))
def test_a_passage_has_the_length_asked_for_and_repeats_beyond_the_book(
    start: float, characters: int
) -> None:
    text = load_book("persuasion")
    assert len(passage(text, start, characters)) == characters


@settings(deadline=None)
@given(st.floats(0, 1))
def test_an_insertion_is_at_a_sentence_end_at_or_before_the_depth(depth: float) -> None:
    text = 'One two. Mr. Three "four!" Five six seven? Eight'
    result, at = insert(text, "NEEDLE.", depth)
    before = result[:at].rstrip()
    assert result[at:].startswith("NEEDLE. ")
    assert len(before) <= round(depth * len(text))
    assert before in ("", "One two.", text[:26], text[:42])
    assert result.replace("NEEDLE. ", "") == text


@pytest.mark.parametrize("content", [b"too short.", b"x" * 5000, b"\xff\xfe" * 3000])
def test_unusable_text_is_refused_with_the_flag_named(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--data .*text"):
        load_text(path)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_text(tmp_path / "none")
