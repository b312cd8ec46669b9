# SPDX-License-Identifier: Apache-2.0
"""Writes a report: JSON for programs, Markdown to paste, HTML to read."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from kvserve.evaluation.backend import AT_ONCE
from kvserve.evaluation.figures import draw
from kvserve.evaluation.store import Cell
from kvserve.evaluation.summary import USABLE, Line, Summary
from kvserve.units import format_bytes

FORMAT = "kvserve-eval/1"


@dataclass(frozen=True)
class Heading:
    """What a report says of itself.

    Attributes:
        model: its name.
        command: the command line that made the report.
        conditions: what all scores share.
        tasks: one line on each task that was run, by name.
        notes: sentences that a reader should know.
    """

    model: str
    command: str
    conditions: dict[str, Any]
    tasks: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: the first column names policies."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(cells: list[Cell], heading: Heading, folder: Path) -> list[Path]:
    """Write ``report.json``, ``.md``, ``.html`` and pictures.

    Args:
        cells: in the order that policies should be listed.

    Returns:
        All files written.
    """
    summary = Summary(cells)
    pictures = draw(summary, heading.model, folder)
    tables = make_tables(summary)
    written = {
        "report.json": _json(summary, heading),
        "report.md": _markdown(summary, heading, tables, pictures),
        "report.html": _html(summary, heading, tables, pictures, folder),
    }
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in [*written, *pictures]]


def make_tables(summary: Summary) -> list[Table]:
    """One table a length with all tasks, then one a task with all lengths."""
    overall = [_length_table(summary, length) for length in summary.lengths]
    several = len(summary.lengths) > 1
    by_task = [_task_table(summary, task) for task in summary.tasks] if several else []
    return [*overall, *by_task]


def _length_table(summary: Summary, length: int) -> Table:
    lines = [line for line in summary.lines if line.length == length]
    tasks = [task for task in summary.tasks if any(line.task == task for line in lines)]
    head = ["policy", "KV held", "KV peak", "score", "95 %", "of full"]
    head += ["tokens/s", "TTFT s", *tasks]
    rows = []
    for policy in summary.policies:
        own = [summary.line(policy, task, length) for task in tasks]
        if not any(own):
            continue
        mean = summary.line(policy, "all", length)
        known = mean or next(line for line in own if line)
        memory = known.memory
        rows.append(
            [
                f"`{policy}`",
                f"{memory.held:.0%}, {format_bytes(memory.bytes)}" if memory else "-",
                f"{memory.peak:.0%}" if memory else "-",
                f"{mean.score:.2f}" if mean else "-",
                f"{mean.low:.2f} to {mean.high:.2f}" if mean else "-",
                _ratio(mean),
                *_speed(known),
                *(_short(line) for line in own),
            ]
        )
    return Table(f"{length} tokens", head, rows)


def _task_table(summary: Summary, task: str) -> Table:
    lengths = [n for n in summary.lengths if _has(summary, task, n)]
    rows = []
    for policy in summary.policies:
        own = [summary.line(policy, task, length) for length in lengths]
        if any(own):
            rows.append([f"`{policy}`", *(_long(line) for line in own)])
    return Table(task, ["policy", *(f"{n} tokens" for n in lengths)], rows)


def _has(summary: Summary, task: str, length: int) -> bool:
    return any((one.task, one.length) == (task, length) for one in summary.lines)


def _ratio(line: Line | None) -> str:
    return "-" if line is None or line.of_full is None else f"{line.of_full:.2f}"


def _speed(line: Line) -> list[str]:
    """Tokens a second, and seconds to the first."""
    if line.speed is None:
        return ["-", "-"]
    first = line.speed.first_after
    return [
        f"{line.speed.tokens_per_second:.1f}",
        "-" if first is None else f"{first:.2f}",
    ]


def _short(line: Line | None) -> str:
    if line is None:
        return "-"
    if not line.usable:
        return f"({line.score:.2f})"
    if line.kind == "perplexity":
        return f"{line.score:.2f}"
    if line.divergence is not None:
        return f"{line.score:.2f}, KL {line.divergence:.3f}"
    if line.kind == "instructions" and line.of_full is not None:
        return f"{line.score:.2f}, {line.of_full:.2f} of full"
    if line.distinct is not None:
        return f"{line.score:.2f}, distinct {line.distinct:.2f}"
    return f"{line.score:.2f}"


def _long(line: Line | None) -> str:
    if line is None:
        return "-"
    held = f", KV {line.memory.held:.0%}" if line.memory else ""
    return f"{_short(line)} [{line.low:.2f} to {line.high:.2f}]{held}"


def remarks(summary: Summary, heading: Heading) -> list[str]:
    """Sentences on what the numbers mean, and what they do not say."""
    found = [
        "KV held: pages that requests held when they ended, counted in the engine's "
        "pool, as a share of a full cache of the same tokens. KV peak: the most they "
        "held on the way; a policy that looks at the whole prompt holds all of it.",
        "Score: mean over the usable tasks with answers, of instructions or equal "
        "likeliest tokens where there are none; its 95 % interval is Wilson's for "
        "right and wrong, bootstrap otherwise.",
    ]
    if any(line.speed for line in summary.lines):
        found.append(
            "tokens/s: of all replies of these tasks, over the seconds in which their "
            f"prompts were read and they were said, {AT_ONCE} at once. TTFT: from when "
            "a request is let in to its first token, with others beside it. Both are "
            "of one run, and of whatever else this machine did; `kvserve bench` "
            "measures speed."
        )
    found += [
        f"{line.task} at {line.length} tokens is unusable, and in brackets: the full "
        f"cache scores {line.score:.2f} itself, below {USABLE}."
        for line in summary.unusable
    ]
    if any(line.kind == "perplexity" for line in summary.lines):
        found.append("perplexity: less is better; it is not part of the score.")
    if any(line.divergence is not None for line in summary.lines):
        found.append(
            "agreement: share of steps at which the likeliest token is the full "
            "cache's, and the KL divergence from it in nats, over the 20 likeliest "
            "tokens and all others as one: a lower bound."
        )
    if any(line.distinct is not None for line in summary.lines):
        found.append(
            "distinct: share of different 4-grams of tokens in a long reply; text that "
            "repeats itself has few."
        )
    if any(line.kind == "instructions" for line in summary.lines):
        found.append(
            "instructions, leak: share of rules that were followed, of passwords that "
            "were not told. Small models fail many under the full cache too: compare "
            "with its score. What has been forgotten cannot be told either."
        )
    return [*found, *heading.notes]


def _json(summary: Summary, heading: Heading) -> str:
    arguments = {
        f"{cell.policy} at {cell.length}": cell.arguments for cell in summary.cells
    }
    report = {
        "format": FORMAT,
        "model": heading.model,
        "command": heading.command,
        "conditions": heading.conditions,
        "tasks": heading.tasks,
        "arguments": arguments,
        "overall": [line.to_json() for line in summary.overall],
        "scores": [line.to_json() for line in summary.lines],
    }
    return json.dumps(report, indent=1) + "\n"


def _markdown(
    summary: Summary, heading: Heading, tables: list[Table], pictures: dict[str, str]
) -> str:
    parts = [
        f"# Cache policies of {heading.model}",
        f"```\n{heading.command}\n```",
        *(
            f"## {table.title}\n\n{table.markdown()}"
            for table in tables[: len(summary.lengths)]
        ),
        *(f"![{text}]({name})" for name, text in pictures.items()),
        *(
            f"## {table.title}\n\n{table.markdown()}"
            for table in tables[len(summary.lengths) :]
        ),
        "## How to read this",
        "\n".join(f"* {text}" for text in remarks(summary, heading)),
        "\n".join(f"* `{name}`: {what}." for name, what in heading.tasks.items()),
        f"Conditions: {_conditions(heading)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _conditions(heading: Heading) -> str:
    return ", ".join(f"{name} {value}" for name, value in heading.conditions.items())


def _html(
    summary: Summary,
    heading: Heading,
    tables: list[Table],
    pictures: dict[str, str],
    folder: Path,
) -> str:
    environment = Environment(
        loader=PackageLoader("kvserve.evaluation"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = [
        (base64.b64encode((folder / name).read_bytes()).decode(), text)
        for name, text in pictures.items()
    ]
    split = len(summary.lengths)
    return environment.get_template("report.html").render(
        heading=heading,
        best=_best(summary),
        overall=[_html_table(table) for table in tables[:split]],
        by_task=[_html_table(table) for table in tables[split:]],
        images=images,
        remarks=remarks(summary, heading),
        conditions=_conditions(heading),
    )


def _html_table(table: Table) -> Table:
    """Without the quotation marks of Markdown."""
    rows = [[row[0].strip("`"), *row[1:]] for row in table.rows]
    return Table(table.title, table.head, rows)


def _best(summary: Summary) -> Line | None:
    """At the longest length, the least memory that keeps 99 % of the full score."""
    lines = [
        line
        for line in summary.overall
        if line.memory and line.of_full is not None and line.of_full >= 0.99
    ]
    longest = max((line.length for line in lines), default=0)
    here = [line for line in lines if line.length == longest]
    return min(here, key=lambda line: line.memory.held, default=None)  # type: ignore[union-attr]
