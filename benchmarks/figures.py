# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured: one curve an engine, or a kernel, over a size."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

COLOURS = ("#888888", "#4477aa", "#cc3311", "#228833", "#aa8833", "#aa3377", "#222222")

Curve = Mapping[float, Sequence[float]]
"""What was measured, several times, at each size."""


def colours() -> Iterator[str]:
    """A colour for each curve, the first for what the others are held against."""
    return itertools.cycle(COLOURS)


def draw_curves(
    curves: Mapping[str, Curve], path: Path, title: str, x: str, y: str
) -> None:
    """Draw medians, and bars from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = sorted({size for curve in curves.values() for size in curve})
    for (name, curve), colour in zip(curves.items(), colours(), strict=False):
        shown = sorted(curve)
        medians = [statistics.median(curve[size]) for size in shown]
        below = [m - min(curve[size]) for m, size in zip(medians, shown, strict=True)]
        above = [max(curve[size]) - m for m, size in zip(medians, shown, strict=True)]
        axes.errorbar(
            shown,
            medians,
            (below, above),
            label=name,
            color=colour,
            marker="o",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
