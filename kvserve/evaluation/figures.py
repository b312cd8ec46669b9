# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report: memory against score, depth against length, tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from kvserve.evaluation.runner import REFERENCE
from kvserve.evaluation.store import Cell
from kvserve.evaluation.summary import Line, Summary
from kvserve.evaluation.tasks import SAID

_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_FULL_COLOUR = "#1f2933"
_COLOURS = (
    *("#0f766e", "#c2410c", "#4338ca", "#b45309", "#be185d", "#15803d"),
    *("#7c3aed", "#0369a1", "#a16207", "#9f1239"),
)
_MARKERS = "oDs^vPX*<>"
_BAD, _MIDDLE, _GOOD = "#b3392f", "#f6ead0", "#11756c"
_SCALE = LinearSegmentedColormap.from_list(
    "score", [_BAD, _MIDDLE, _GOOD]
).with_extremes(bad="#eef0f2")
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}
_BINS = 8


def draw(summary: Summary, model: str, folder: Path) -> dict[str, str]:
    """Draw every figure that the cells allow.

    Returns:
        What each picture shows, by file name.
    """
    found = {}
    with mpl.rc_context(_STYLE):
        if any(line.memory for line in summary.overall):
            name = "pareto.png"
            _save(_pareto(summary, model), folder / name)
            found[name] = "Score against KV memory held. Up and to the left is better."
        for task in _with_depth(summary):
            name = f"heat-{task}.png"
            _save(_heat(summary, task), folder / name)
            found[name] = f"{task}: score by depth of the answer and by length."
        if len(_tasks_at(summary, _busiest(summary))) > 1:
            name = "tasks.png"
            _save(_tasks(summary), folder / name)
            found[name] = (
                f"Every task at {_busiest(summary)} tokens. Grey: the full cache "
                "itself fails, so the task tells nothing."
            )
    return found


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    # No date or version inside: the same cells give the same bytes.
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def _pareto(summary: Summary, model: str) -> Figure:
    lengths = sorted({line.length for line in summary.overall if line.memory})
    columns = 3 if len(lengths) in (3, 5, 6) else min(len(lengths), 2)
    rows = -(-len(lengths) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.9 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = _styles(summary.policies)
    for axis, length in zip(axes, lengths, strict=False):
        here = [
            line for line in summary.overall if line.length == length and line.memory
        ]
        _pareto_panel(axis, here, styles)
        axis.set_title(f"{length} tokens")
    for axis in axes[len(lengths) :]:
        axis.set_visible(False)
    what = "score" if _answers(summary) else "agreement with the full cache"
    figure.suptitle(
        f"{model}: what a KV budget costs",
        fontsize=13,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    figure.supxlabel(
        "KV memory held, share of the full cache (measured pages)", fontsize=9.5
    )
    figure.supylabel(f"{what}, mean of usable tasks", fontsize=9.5)
    return figure


def _pareto_panel(axis: Any, lines: list[Line], styles: dict[str, Any]) -> None:
    _quiet(axis)
    axis.set_xlim(0, 1.08)
    axis.set_ylim(-0.04, 1.08)
    axis.grid(color=_GRID, linewidth=0.8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    edge = _frontier(lines)
    axis.step(
        *zip(*edge, strict=True), where="post", color="#9fd4cd", linewidth=2, zorder=1
    )
    axis.fill_between(
        *zip(*edge, strict=True), step="post", color="#e6f4f2", zorder=0, linewidth=0
    )
    _family_lines(axis, lines, styles)
    for line in lines:
        assert line.memory is not None
        colour, marker = styles[line.policy]
        axis.errorbar(
            line.memory.held,
            line.score,
            yerr=[[max(line.score - line.low, 0)], [max(line.high - line.score, 0)]],
            fmt=marker,
            color=colour,
            markersize=8,
            markeredgecolor="white",
            ecolor=colour + "55",
            elinewidth=1.4,
            zorder=4,
        )
    _labels(axis, lines, styles)


def _family_lines(axis: Any, lines: list[Line], styles: dict[str, Any]) -> None:
    """Join budgets of the same policy."""
    families: dict[str, list[Line]] = {}
    for line in lines:
        families.setdefault(_family(line.policy), []).append(line)
    for members in families.values():
        points = sorted((one.memory.held, one.score) for one in members if one.memory)
        colour = styles[members[0].policy][0]
        axis.plot(
            *zip(*points, strict=True), color=colour, linewidth=1, alpha=0.5, zorder=2
        )


def _frontier(lines: list[Line]) -> list[tuple[float, float]]:
    """The best score that can be had with so much memory, as corners of steps."""
    points = sorted((line.memory.held, line.score) for line in lines if line.memory)
    edge, best = [], -1.0
    for held, score in points:
        if score > best:
            edge.append((held, score))
            best = score
    return [*edge, (1.08, best)]


def _labels(axis: Any, lines: list[Line], styles: dict[str, Any]) -> None:
    """Name the points, each where no point or name is yet."""
    spots = [(one.memory.held, one.score) for one in lines if one.memory]
    taken = [(x - 0.015, y - 0.025, x + 0.015, y + 0.025) for x, y in spots]
    for line in sorted(lines, key=lambda one: (-one.score, one.memory.held)):  # type: ignore[union-attr]
        assert line.memory is not None
        x, y = line.memory.held, line.score
        name = _short(line.policy)
        width, height = 0.0165 * len(name) + 0.01, 0.06
        for right, drop in _PLACES:
            left = x + 0.02 if right else x - 0.02 - width
            bottom = y + drop - height / 2
            box = (left, bottom, left + width, bottom + height)
            inside = left > 0 and box[2] < 1.08 and bottom > -0.04 and box[3] < 1.08
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axis.annotate(
            name,
            (x, y),
            (left, bottom + height / 2),
            fontsize=8.2,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            va="center",
            color=styles[line.policy][0],
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#cbd2d9", "linewidth": 0.7}
            if abs(drop) > 0.04
            else None,
        )


_PLACES = [
    (right, drop)
    for drop in (0, -0.07, 0.07, -0.14, 0.14, -0.21, 0.21, -0.28, 0.28, -0.35, 0.35)
    for right in (True, False)
]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _heat(summary: Summary, task: str) -> Figure:
    policies = [p for p in summary.policies if _lengths(summary, p, task)]
    columns = min(len(policies), 4)
    rows = -(-len(policies) // columns)
    width = max(2.6, 0.62 * len(summary.lengths) + 0.9)
    figure = Figure(
        figsize=(width * columns + 0.9, 2.75 * rows + 0.8), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, axis in enumerate(axes.ravel()):
        if number >= len(policies):
            axis.set_visible(False)
            continue
        image = _heat_panel(axis, summary, policies[number], task)
        if number % columns == 0:
            axis.set_ylabel("depth of the answer")
    figure.suptitle(
        f"{task}: where answers are found",
        fontsize=13,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    figure.supxlabel("tokens of prompt and reply", fontsize=9.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label("score")
    return figure


def _heat_panel(axis: Any, summary: Summary, policy: str, task: str) -> Any:
    lengths = _lengths(summary, policy, task)
    bins = min(_BINS, *(len(set(cell.depths)) for cell in _of_task(summary, task)))
    table = np.full((bins, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        cell = summary.cell(policy, task, length)
        assert cell is not None
        by_bin: dict[int, list[float]] = {}
        for depth, score in zip(cell.depths, cell.scores, strict=True):
            if depth is not None:
                by_bin.setdefault(min(int(depth * bins), bins - 1), []).append(score)
        for row, scores in by_bin.items():
            table[row, column] = sum(scores) / len(scores)
    image = axis.imshow(table, cmap=_SCALE, vmin=0, vmax=1, aspect="auto")
    _quiet(axis)
    axis.set_title(_short(policy), fontsize=9)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["start", "middle", "end"])
    axis.set_xticks(np.arange(-0.5, len(lengths)), minor=True)
    axis.set_yticks(np.arange(-0.5, bins), minor=True)
    # A label in the middle would take the line between cells with it.
    axis.yaxis.remove_overlapping_locs = False
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
    return image


def _tasks(summary: Summary) -> Figure:
    """A table in colours: policies by memory, tasks across."""
    length = _busiest(summary)
    tasks = _tasks_at(summary, length)
    policies = [
        p for p in summary.policies if any(summary.line(p, t, length) for t in tasks)
    ]
    figure = Figure(
        figsize=(1.15 * len(tasks) + 3.4, 0.42 * len(policies) + 1.5),
        layout="constrained",
    )
    axis = figure.subplots()
    table = np.full((len(policies), len(tasks)), np.nan)
    for row, policy in enumerate(policies):
        for column, task in enumerate(tasks):
            line = summary.line(policy, task, length)
            if line is None:
                continue
            if line.usable:
                table[row, column] = _goodness(line)
            _write(axis, column, row, line, table[row, column])
    axis.imshow(table, cmap=_SCALE, vmin=0, vmax=1, aspect="auto")
    _quiet(axis)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(
        range(len(policies)), [_with_memory(summary, p, length) for p in policies]
    )
    axis.tick_params(
        top=True,
        labeltop=True,
        bottom=False,
        labelbottom=False,
        length=0,
        labelcolor=_INK,
    )
    axis.set_xticks(np.arange(-0.5, len(tasks)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(policies)), minor=True)
    axis.grid(which="minor", color="white", linewidth=2.5)
    axis.tick_params(which="minor", length=0)
    figure.suptitle(
        f"{length} tokens, task by task",
        fontsize=13,
        fontweight="bold",
        x=0.02,
        ha="left",
    )
    return figure


def _write(axis: Any, column: int, row: int, line: Line, colour: float) -> None:
    text = f"{line.score:.1f}" if line.kind == "perplexity" else f"{line.score:.2f}"
    dark = colour == colour and abs(colour - 0.5) > 0.33
    axis.text(
        column,
        row,
        text if line.usable else f"({text})",
        ha="center",
        va="center",
        fontsize=9,
        color="white" if dark else _INK if line.usable else _FAINT,
    )


def _goodness(line: Line) -> float:
    """Where a score lies between bad and good; some by their ratio to full."""
    if line.kind == "instructions":
        return np.nan if line.of_full is None else min(line.of_full, 1.0)
    if line.kind != "perplexity":
        return line.score
    return 1.0 if line.of_full is None else max(0.0, 1 - 2 * (line.of_full - 1))


def _with_memory(summary: Summary, policy: str, length: int) -> str:
    line = summary.line(policy, "all", length)
    if line is None or line.memory is None:
        return _short(policy)
    return f"{_short(policy)}   KV {line.memory.held:.0%}"


def _with_depth(summary: Summary) -> list[str]:
    return [
        task
        for task in summary.tasks
        if any(cell.depths[0] is not None for cell in _of_task(summary, task))
    ]


def _of_task(summary: Summary, task: str) -> list[Cell]:
    return [cell for cell in summary.cells if cell.task == task]


def _lengths(summary: Summary, policy: str, task: str) -> list[int]:
    return [n for n in summary.lengths if summary.cell(policy, task, n)]


def _tasks_at(summary: Summary, length: int) -> list[str]:
    found = {line.task for line in summary.lines if line.length == length}
    return [task for task in summary.tasks if task in found]


def _busiest(summary: Summary) -> int:
    """The length of most tasks, and of these the longest."""
    return max(summary.lengths, key=lambda n: (len(_tasks_at(summary, n)), n))


def _answers(summary: Summary) -> bool:
    return any(line.kind in SAID for line in summary.overall)


def _short(policy: str) -> str:
    """A policy's name where there is little room."""
    return policy.replace(":budget=", " ")


def _family(policy: str) -> str:
    return policy.partition(":")[0]


def _styles(policies: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for every family of budgets."""
    families = [f for f in dict.fromkeys(map(_family, policies)) if f != REFERENCE]
    looks = {
        family: (_COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)])
        for n, family in enumerate(families)
    }
    looks[REFERENCE] = (_FULL_COLOUR, "o")
    return {policy: looks[_family(policy)] for policy in policies}


def _quiet(axis: Any) -> None:
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
