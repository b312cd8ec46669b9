# SPDX-License-Identifier: Apache-2.0
"""The picture of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_heat_map(profile: dict[str, Any], path: Path) -> None:
    """Draw layers over heads, KV heads beside query heads, as a PNG."""
    from matplotlib.figure import Figure

    layers, query_heads = profile["num_layers"], profile["num_query_heads"]
    kv_heads = profile["num_kv_heads"]
    size = (3.5 + 0.42 * (query_heads + kv_heads), 1.5 + 0.26 * layers)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(kv_heads, query_heads))
    threshold = profile["settings"]["threshold"]
    for axes, kind in zip(panels, ("kv", "query"), strict=True):
        rows = profile[f"{kind}_head_scores"]
        image = axes.imshow(rows, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        name = kind.upper() if kind == "kv" else kind
        axes.set(xlabel=f"{name} head", xticks=range(len(rows[0])))
        axes.set(yticks=range(layers))
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                if value >= threshold:
                    colour = "black" if value > 0.6 else "white"
                    label = f"{value:.2f}".lstrip("0")
                    axes.text(
                        head, layer, label, color=colour, ha="center", va="center"
                    )
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="retrieval score")
    kept = profile["instances"]["kept"]
    figure.suptitle(f"Retrieval heads of {profile['model']} ({kept} needles)")
    figure.savefig(path, dpi=110)
