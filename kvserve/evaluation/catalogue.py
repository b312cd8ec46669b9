# SPDX-License-Identifier: Apache-2.0
"""The tasks that ship."""

from __future__ import annotations

from kvserve.evaluation import continuations, instructions, long_replies
from kvserve.evaluation.ruler import (
    answering,
    needles,
    second_turn,
    tracking,
    word_lists,
)
from kvserve.evaluation.tasks import Build, Task


def built_in() -> dict[str, Task]:
    """All tasks that ship, by name, in the order of reports."""
    tasks = [
        *_our_own(),
        *_ruler(),
        *_long_replies(),
        *_instructions(),
        *_continuations(),
    ]
    return {task.name: task for task in tasks}


def groups() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks."""
    return {
        "ruler": tuple(task.name for task in _ruler()),
        "long": tuple(task.name for task in _long_replies()),
    }


def _our_own() -> list[Task]:
    return [
        _asked(
            "needle",
            "one magic number hidden in a novel",
            needles.needle,
            has_depth=True,
        ),
        _asked(
            "multikey",
            "one of four magic numbers of the same form",
            needles.multikey,
            has_depth=True,
        ),
        _asked("multivalue", "all four numbers of one key", needles.multivalue),
        _asked(
            "tracking",
            "five variables along a chain of assignments",
            tracking.tracking,
        ),
        _asked(
            "counting",
            "the ten commonest words of a long list",
            word_lists.counting,
        ),
        Task(
            "second-turn",
            "answers",
            "a second number, asked for after the first answer, on the same cache",
            second_turn.second_turn,
            has_depth=True,
            forces=True,
        ),
    ]


_NIAH = {
    "niah_single_1": "a number in sentences that repeat",
    "niah_single_2": "a number in a novel",
    "niah_single_3": "a UUID in a novel",
    "niah_multikey_1": "one of four numbers in a novel",
    "niah_multikey_2": "one number in a list of nothing else",
    "niah_multikey_3": "the UUID of a UUID in a list of nothing else",
    "niah_multivalue": "four numbers of one key in a novel",
    "niah_multiquery": "the numbers of four keys in a novel",
}


def _ruler() -> list[Task]:
    """The 13 tasks, under their own names and in their own order."""
    others: list[tuple[str, str, Build]] = [
        ("vt", "five variables along a chain, in sentences that repeat", tracking.vt),
        ("cwe", "the ten common words of a list", word_lists.cwe),
        ("fwe", "the three most frequent of made-up words", word_lists.fwe),
        ("qa_1", "what one of many made-up passages says", answering.qa_1),
        ("qa_2", "what two of many made-up passages say together", answering.qa_2),
    ]
    return [
        *(
            _asked(one.name, _NIAH[one.name], one, has_depth=one.has_depth)
            for one in needles.NIAH
        ),
        *(_asked(*one) for one in others),
    ]


def _asked(name: str, what: str, build: Build, has_depth: bool = False) -> Task:
    """A question about a context, answered by strings that are in it."""
    return Task(name, "answers", what, build, has_depth, has_question=True)


def _long_replies() -> list[Task]:
    return [
        Task(
            "long-copy",
            "answers",
            "a list in a novel, repeated line by line in a long reply",
            long_replies.long_copy,
            has_depth=True,
            is_long=True,
        ),
        Task(
            "long-count",
            "answers",
            "numbers in their order in a long reply",
            long_replies.long_count,
            is_long=True,
        ),
    ]


def _instructions() -> list[Task]:
    return [
        Task(
            "instructions",
            "instructions",
            "four rules of a system prompt that a long text follows",
            instructions.instructions,
        ),
        Task(
            "leak",
            "instructions",
            "a password of the system prompt that is not to be told",
            instructions.leak,
        ),
        Task(
            "system-facts",
            "answers",
            "one of eight numbers of a system prompt that a long text follows",
            instructions.system_facts,
        ),
    ]


def _continuations() -> list[Task]:
    return [
        Task(
            "perplexity",
            "perplexity",
            "of a novel's next 128 tokens, fed through decoding",
            continuations.perplexity,
            forces=True,
        ),
        Task(
            "agreement",
            "agreement",
            "next-token distributions along the full cache's own reply of 64 tokens",
            continuations.agreement,
            forces=True,
        ),
    ]
