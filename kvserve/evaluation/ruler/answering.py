# SPDX-License-Identifier: Apache-2.0
"""Questions about passages, among many others that do not matter.

RULER takes both from SQuAD and HotpotQA; here they are of a made-up country.
"""

from __future__ import annotations

from kvserve.evaluation.backend import Request
from kvserve.evaluation.prompts import Ask, most_that_fits, render
from kvserve.evaluation.ruler.world import MOST, Question, World
from kvserve.evaluation.tasks import Place, Sample

_REPLY = 32


def qa_1(place: Place) -> Sample:
    """A question that one passage answers."""
    return _ask(place, "qa_1")


def qa_2(place: Place) -> Sample:
    """A question that two passages answer together."""
    return _ask(place, "qa_2")


def _ask(place: Place, task: str) -> Sample:
    seed = f"{task}/{place.seed}/{place.length}/{place.index}"
    room = place.length - _REPLY

    def make(size: int) -> tuple[list[int], Question]:
        world = World(seed, size)
        text = world.text()
        linked = task == "qa_2"
        question = world.linked_question() if linked else world.simple_question()
        return render(place, text, _asked(question)).token_ids, question

    # Two passages take fifty tokens at the very least.
    most = min(place.length // 50, MOST)
    size = most_that_fits(
        2, most, lambda size: len(make(size)[0]) <= room, "four passages"
    )
    prompt, question = make(size)
    return Sample(Request(prompt, reply=_REPLY), (question.answer,))


def _asked(question: Question) -> Ask:
    return Ask(
        question.text,
        "The answer is:",
        "Answer the question with a few words of the passages above.",
    )
