# SPDX-License-Identifier: Apache-2.0
"""What is asked of every policy: tasks at lengths, with all their prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.catalogue import built_in, groups
from kvserve.evaluation.runner import Assignment
from kvserve.evaluation.tasks import Task
from kvserve.evaluation.user_task import load_user_task


def lengths_of(args: argparse.Namespace) -> list[int]:
    """Read ``--length``.

    Raises:
        UserError: it is malformed, or too many.
    """
    default = "4096" if args.find_budget is not None else "1024,2048,4096"
    parts = [one for part in args.length or [default] for one in part.split(",")]
    try:
        lengths = sorted({int(part) for part in parts})
    except ValueError:
        raise UserError(
            f"--length {','.join(parts)}: expected numbers of tokens, e.g. 1024,4096"
        ) from None
    if lengths[0] < 1:
        raise UserError(f"--length {lengths[0]}: must be a number of tokens")
    if args.find_budget is not None and len(lengths) > 1:
        raise UserError("--find-budget: a server has one budget; give one --length")
    return lengths


def assignments_of(
    args: argparse.Namespace, lengths: list[int], tokenizer: Any, text: str
) -> list[Assignment]:
    """Make all prompts of all tasks.

    Args:
        text: what things are hidden in.

    Raises:
        UserError: a task is unknown, or has no room in a length.
    """
    names = _names(args.task or ["needle"])
    made = [
        Assignment(
            task,
            length,
            task.samples(tokenizer, text, args.seed, length, args.samples, args.reply),
        )
        for length in lengths
        for task in _tasks(names, args.question)
    ]
    for name in names:
        if name.endswith(".jsonl"):
            user = load_user_task(Path(name), tokenizer)
            if user.task.name.removesuffix("-before") in built_in():
                raise UserError(f"--task {name}: is called like a task that ships")
            made.append(Assignment(user.task, user.mean_length, user.samples))
    return made


def _names(parts: Iterable[str]) -> list[str]:
    """Every name once, groups written out."""
    typed = [name for part in parts for name in part.split(",")]
    found = [one for name in typed for one in groups().get(name, (name,))]
    return list(dict.fromkeys(found))


def _tasks(names: list[str], question: str) -> list[Task]:
    """Built-in tasks in the order of reports, their questions where they are wanted."""
    known = built_in()
    for name in names:
        if name not in known and not name.endswith(".jsonl"):
            raise UserError(
                f"--task {name}: unknown; choose among {', '.join(known)}, say "
                f"{' or '.join(groups())} for several, or name a file that ends in "
                ".jsonl"
            )
    tasks: list[Task] = []
    for task in known.values():
        if task.name not in names:
            continue
        if question != "before" or not task.has_question:
            tasks.append(task)
        if question != "after" and task.has_question:
            tasks.append(task.asked_before())
    return tasks
