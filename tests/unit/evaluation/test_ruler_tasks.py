# SPDX-License-Identifier: Apache-2.0
"""The 13 RULER tasks: their forms, and where their questions stand."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import pytest

from kvserve.evaluation.catalogue import built_in, groups
from kvserve.evaluation.ruler.world import World
from kvserve.evaluation.tasks import Sample
from kvserve.texts.haystack import load_book
from tests.unit.byte_tokenizer import byte_tokenizer

RULER = {
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
}
TASKS = built_in()
TOKENIZER: Any = byte_tokenizer()
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@functools.cache
def made(name: str, length: int = 4000, before: bool = False) -> list[Sample]:
    task = TASKS[name].asked_before() if before else TASKS[name]
    return task.samples(TOKENIZER, load_book("persuasion"), 0, length, 2)


def prompt_of(sample: Sample) -> str:
    text: str = TOKENIZER.decode(sample.request.prompt)
    return text


def test_ruler_is_a_group_of_thirteen() -> None:
    assert set(groups()["ruler"]) == RULER
    assert len(groups()["ruler"]) == 13


@pytest.mark.parametrize(
    ("name", "answers", "value", "needles"),
    [
        ("niah_single_1", 1, r"\d{7}", 1),
        ("niah_single_2", 1, r"\d{7}", 1),
        ("niah_single_3", 1, UUID, 1),
        ("niah_multikey_1", 1, r"\d{7}", 4),
        ("niah_multivalue", 4, r"\d{7}", 4),
        ("niah_multiquery", 4, r"\d{7}", 4),
    ],
)
def test_needles_have_the_numbers_of_keys_and_values_that_ruler_has(
    name: str, answers: int, value: str, needles: int
) -> None:
    for sample in made(name):
        found = re.findall(rf"for (\w+-\w+) is: ({value})\.", prompt_of(sample))
        assert len(found) == needles
        assert len(sample.answers) == len(set(sample.answers)) == answers
        assert set(sample.answers) <= {number for _, number in found}
        keys = {key for key, _ in found}
        assert len(keys) == (1 if name == "niah_multivalue" else needles)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_nothing_else_and_every_key_once(name: str) -> None:
    for sample in made(name):
        context, asked = prompt_of(sample).rsplit("\n\n", 1)
        found = re.findall(r"One of .*? for (\S+) is: (\S+)\.", context)
        assert len(found) == len(context.splitlines()) > 20
        assert len(dict(found)) == len(found)
        (key,) = (key for key, value in found if value == sample.answers[0])
        assert f"for {key} mentioned" in asked


def test_vt_shows_an_example_with_other_variables_before_its_chain() -> None:
    for sample in made("vt"):
        example, own = prompt_of(sample).split("they are:", 1)
        assert re.findall(r"VAR (\w+) = \d", example)[0] in own.split("\n")[0]
        places = [own.index(f"VAR {name} = ") for name in sample.answers]
        assert places == sorted(places)


@pytest.mark.parametrize(("length", "often", "seldom"), [(4000, 6, 1), (16_000, 30, 3)])
def test_cwe_has_rulers_frequencies(length: int, often: int, seldom: int) -> None:
    for sample in made("cwe", length):
        listed = prompt_of(sample).split("\n\n")[-2].split()[1::2]
        counts = Counter(listed)
        assert all(counts.pop(word) == often for word in sample.answers)
        assert set(counts.values()) == {seldom}


def test_fwe_asks_for_the_most_frequent_after_the_dots() -> None:
    for sample in made("fwe"):
        counts = Counter(prompt_of(sample).split("\n\n")[0].split())
        ranked = [word for word, _ in counts.most_common(4)]
        assert ranked == ["...", *sample.answers]
        assert counts["..."] == pytest.approx(4 * counts[ranked[1]], abs=4)


def test_passages_of_a_made_up_country_answer_their_questions() -> None:
    world = World("seed", 30)
    text = world.text()
    assert text.count("Passage ") == 60
    assert len({town.name for town in world.towns}) == 30
    for question in (world.simple_question(), world.linked_question()):
        assert question.answer in text
    assert World("seed", 30).text() == text


def test_a_linked_question_names_nobody_whose_passage_has_the_answer() -> None:
    for sample in made("qa_2", 6000):
        passages = re.split(r"Passage \d+:\n", prompt_of(sample))
        asked = prompt_of(sample).split("Question: ")[1]
        (first,) = (
            one
            for one in passages
            if (name := re.match(r"(.+?) (?:is a town|was born)", one))
            and name[1] in asked
        )
        assert first.count(sample.answers[0]) == 0


@pytest.mark.parametrize("name", [n for n in TASKS if TASKS[n].has_question])
def test_a_question_may_come_before_the_same_text(name: str) -> None:
    for after, before in zip(made(name), made(name, before=True), strict=True):
        assert before.answers == after.answers
        assert before.request.tokens <= 4000
        text = prompt_of(before)
        question = re.findall(r"\nQuestion: (.*)", text)[-1]
        assert text.rindex(question) < min(text.rindex(a) for a in before.answers)
        assert "above" not in question
        shown = prompt_of(after).split("\n\n")[0][:200]
        assert shown.split("Question")[0] in text


def test_tasks_asked_before_are_called_so() -> None:
    assert TASKS["vt"].asked_before().name == "vt-before"
    assert not TASKS["second-turn"].has_question
