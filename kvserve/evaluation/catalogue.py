# SPDX-License-Identifier: Apache-2.0
"""The tasks that ship."""

from __future__ import annotations

from kvserve.evaluation import continuations, ruler
from kvserve.evaluation.tasks import Task


def built_in() -> dict[str, Task]:
    """All tasks that ship, by name, in the order of reports."""
    tasks = [
        Task(
            "needle",
            "answers",
            "one magic number hidden in a novel (RULER NIAH single)",
            ruler.needle,
            has_depth=True,
        ),
        Task(
            "multikey",
            "answers",
            "one of four magic numbers of the same form (RULER NIAH multi-key)",
            ruler.multikey,
            has_depth=True,
        ),
        Task(
            "multivalue",
            "answers",
            "all four numbers of one key (RULER NIAH multi-value)",
            ruler.multivalue,
        ),
        Task(
            "tracking",
            "answers",
            "five variables along a chain of assignments (RULER variable tracking)",
            ruler.tracking,
        ),
        Task(
            "counting",
            "answers",
            "the ten commonest words of a long list (RULER common words)",
            ruler.counting,
        ),
        Task(
            "second-turn",
            "answers",
            "a second number, asked for after the first answer, on the same cache",
            ruler.second_turn,
            has_depth=True,
            forces=True,
        ),
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
    return {task.name: task for task in tasks}
