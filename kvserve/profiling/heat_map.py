# SPDX-License-Identifier: Apache-2.0
"""The pictures of profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from policies.moa import span

_SHOWN_GATE = 0.3
"""Gates are averages over a training in which all begin open: none is near 0."""


def draw_heat_map(profile: dict[str, Any], path: Path) -> None:
    """Draw layers over heads as a PNG: gates, then scores of KV and query heads."""
    from matplotlib.figure import Figure

    layers, query_heads = profile["num_layers"], profile["num_query_heads"]
    kv_heads = profile["num_kv_heads"]
    threshold = profile["settings"]["threshold"]
    kinds = {
        "kv_head_gates": ("gate", "KV head", kv_heads, _SHOWN_GATE),
        "kv_head_scores": ("score", "KV head", kv_heads, threshold),
        "query_head_scores": ("score", "query head", query_heads, threshold),
    }
    shown = {key: kind for key, kind in kinds.items() if key in profile}
    widths = [heads for _, _, heads, _ in shown.values()]
    size = (3.5 + 0.42 * sum(widths), 1.5 + 0.26 * layers)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, width_ratios=widths)
    for axes, (key, kind) in zip(panels, shown.items(), strict=True):
        what, head_name, _, limit = kind
        rows = profile[key]
        image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set(title=what, xlabel=head_name, xticks=range(len(rows[0])))
        axes.set(yticks=range(layers))
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                if value >= limit:
                    colour = "black" if value > 0.6 else "white"
                    label = f"{value:.2f}".lstrip("0")
                    axes.text(
                        head, layer, label, color=colour, ha="center", va="center"
                    )
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="1: needs the whole cache")
    kept = profile["instances"]["kept"]
    figure.suptitle(f"Which heads of {profile['model']} retrieve ({kept} needles)")
    figure.savefig(path, dpi=110)


def draw_spans(profile: dict[str, Any], path: Path) -> None:
    """Draw what share of a request each KV head keeps, for each budget and length."""
    from matplotlib.figure import Figure

    layers, heads = profile["num_layers"], profile["num_kv_heads"]
    plans, lengths = profile["plans"], profile["settings"]["lengths"]
    columns = [(plan, length) for plan in plans for length in lengths]
    size = (2.5 + len(columns) * (0.6 + 0.42 * heads), 1.8 + 0.26 * layers)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (plan, length) in zip(panels, columns, strict=True):
        rules = zip(plan["alphas"], plan["betas"], strict=True)
        shares = [
            [span(*rule, length) / length for rule in zip(*layer, strict=True)]
            for layer in rules
        ]
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"{plan['budget']:.0%} of\n{length} tokens", xlabel="KV head")
        axes.set(xticks=range(heads), yticks=range(layers))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="1: keeps everything")
    figure.suptitle(f"Spans of the heads of {profile['model']}")
    figure.savefig(path, dpi=110)
