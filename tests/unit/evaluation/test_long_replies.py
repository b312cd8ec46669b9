# SPDX-License-Identifier: Apache-2.0
"""Long replies: what counts as copied, as counted, and as repetition."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvserve.errors import UserError
from kvserve.evaluation.catalogue import built_in, groups
from kvserve.evaluation.long_replies import Copied, Counted, in_order
from kvserve.evaluation.runner import Runner
from kvserve.evaluation.statistics import distinct
from kvserve.evaluation.store import Store
from kvserve.evaluation.tasks import Sample
from kvserve.texts.haystack import load_book
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.fake_backend import FakeContender, assignment

TOKENIZER: Any = byte_tokenizer()
LINES = ("maple otter 314", "kettle barn 159", "lemon quilt 265")


def made(name: str, reply: int, length: int = 2000) -> list[Sample]:
    task = built_in()[name]
    return task.samples(TOKENIZER, load_book("persuasion"), 0, length, 2, reply)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (LINES, 1),
        (("Here it is:", *LINES, "", "and so on"), 1),
        ((LINES[0], f" {LINES[2]} "), 2 / 3),
        ((LINES[0], LINES[0], "kettle barn 158", LINES[0]), 1 / 3),
        ((*LINES[1:], LINES[0]), 2 / 3),
        ((), 0),
    ],
)
def test_a_copy_scores_by_lines_in_their_order(
    reply: tuple[str, ...], score: float
) -> None:
    assert Copied(LINES)("\n".join(reply)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("10\n11\n12\n13", 1),
        ("10, 11, then 13", 0.75),
        ("10\n10\n10\n10", 0.25),
        ("110\n112", 0),
    ],
)
def test_a_count_scores_by_numbers_in_their_order(reply: str, score: float) -> None:
    assert Counted(10, 13)(reply) == score


def test_what_is_said_out_of_order_counts_once() -> None:
    assert in_order("abcd", "cdab") == 0.5


@pytest.mark.parametrize("reply", [64, 256, 900])
def test_the_list_to_copy_is_as_long_as_the_reply(reply: int) -> None:
    for sample in made("long-copy", reply):
        prompt = TOKENIZER.decode(sample.request.prompt)
        (text,) = sample.answers
        first = prompt.splitlines()[-1].removeprefix("Answer: ")
        assert re.fullmatch(r"\w+ \w+ \d{3}", first)
        assert f"\n\n{first}\n{text}\n\n" in prompt
        assert 0.9 * reply - 25 <= len(text) + len(first) <= reply
        assert sample.request.reply == reply
        assert sample.request.tokens == pytest.approx(2000, abs=40)
        assert sample.score(text) == 1


@pytest.mark.parametrize("reply", [64, 1500])
def test_as_many_numbers_are_asked_for_as_the_reply_has_room_for(reply: int) -> None:
    for sample in made("long-count", reply):
        prompt = TOKENIZER.decode(sample.request.prompt)
        last_said = int(prompt.split()[-1])
        room = list(range(last_said + 1, last_said + 1 + reply))
        text = "\n".join(map(str, room))[:reply]
        assert sample.score(text) >= 0.95
        assert sample.grade == Counted(room[0], sample.grade.last)  # type: ignore[union-attr]
        assert reply / 6 < len(text.split()) <= reply


def test_a_reply_without_room_is_refused_and_says_how_to_get_some() -> None:
    with pytest.raises(UserError, match=r"--task long-copy .*reply of 1000 tokens"):
        made("long-copy", 1000)
    with pytest.raises(UserError, match="another --reply, of at least 64"):
        made("long-count", 4)


def test_distinct_falls_when_a_text_repeats_itself() -> None:
    assert distinct(range(100)) == 1
    assert distinct([1, 2, 3]) == 1
    assert distinct([7] * 103) == 0.01


def test_repetition_is_measured_where_replies_are_long(tmp_path: Path) -> None:
    work = [assignment(), assignment(name="long", is_long=True)]
    store = Store(tmp_path, {})
    Runner(work, store, show=False).run([FakeContender("a", right=4)])
    assert store.cells["a", "task", 64].distinct == []
    # The fake says the same token over and over, four of them.
    assert store.cells["a", "long", 64].distinct == [1.0] * 4


def test_long_is_a_group() -> None:
    assert groups()["long"] == ("long-copy", "long-count")
