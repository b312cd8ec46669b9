# SPDX-License-Identifier: Apache-2.0
"""Files of head scores: our own profiles and the two formats others publish."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from kvserve.errors import UserError
from policies.base import ModelShape
from policies.files import read_measured, refuse_model, shipped_or

PROFILE_FORMAT = "kvserve-retrieval/1"

Scores = list[list[float]]


def has_shipped_profile(model_name: str) -> bool:
    """Tell whether a profile ships for the model of this base name."""
    return scores_path(None, model_name).exists()


def scores_path(profile: str | None, model_name: str) -> Path:
    """The file of head scores that ``profile`` names, else that which ships."""
    return shipped_or(profile, model_name, "retrieval.json")


def load_head_scores(profile: str | None, model: ModelShape) -> Scores:
    """Read one score per KV head, of shape ``[num_layers][num_kv_heads]``.

    Accepts kvserve's own JSON (its gates where it has them, else its scores), the
    one-line ``{"layer-head": [scores]}`` JSON of the Retrieval Head authors (query
    heads; a KV head takes the maximum of its group) and DuoAttention's tab-separated
    gates (clipped to [0, 1]).

    Raises:
        UserError: no profile, an unreadable file, or one of another model.
    """
    path = scores_path(profile, model.name)
    if not profile and not path.exists():
        raise UserError(
            f"--policy retrieval: no profile ships for {model.name}; run "
            f"`kvserve profile retrieval --fast MODEL` and pass "
            f"`--policy-arg profile=FILE`, or choose `--policy full`"
        )
    formats = "kvserve or Retrieval_Head JSON, or DuoAttention TSV"
    parse = partial(_parse, model=model, path=path)
    scores = [*model.own(read_measured("profile", path, parse, formats))]
    _check(scores, model, path)
    return scores


def top_heads(scores: Scores, ratio: float) -> frozenset[tuple[int, int]]:
    """Return the ``ratio`` best ``(layer, head)`` pairs over all layers jointly.

    Equal scores go to the lower layer, then the lower head.
    """
    ranked = sorted(
        (-score, layer, head)
        for layer, row in enumerate(scores)
        for head, score in enumerate(row)
    )
    count = round(ratio * len(ranked))
    return frozenset((layer, head) for _, layer, head in ranked[:count])


def _parse(text: str, model: ModelShape, path: Path) -> Scores:
    if not text.lstrip().startswith("{"):
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        return [[min(1.0, max(0.0, _finite(gate))) for gate in row] for row in rows]
    data = json.loads(text)
    if "format" not in data:
        return _from_query_heads(data, model, path)
    if data["format"] != PROFILE_FORMAT:
        raise ValueError(f"format {data['format']!r}, expected {PROFILE_FORMAT!r}")
    scores = data.get("kv_head_gates", data["kv_head_scores"])
    return [[_finite(score) for score in row] for row in scores]


def _from_query_heads(data: dict[str, Any], model: ModelShape, path: Path) -> Scores:
    layers = model.all_layers or model.num_layers
    scores = [[0.0] * model.num_kv_heads for _ in range(layers)]
    pairs = [tuple(int(part) for part in key.split("-")) for key in data]
    found = (
        1 + max((layer for layer, _ in pairs), default=-1),
        1 + max((head for _, head in pairs), default=-1),
    )
    if found != (layers, model.num_query_heads):
        shape = f"{found[0]} layers x {found[1]} query heads"
        refuse_model("profile", path, shape, model)
    if len(pairs) < layers * model.num_query_heads:
        raise ValueError("it lacks some heads")
    for (layer, head), samples in zip(pairs, data.values(), strict=True):
        mean = _finite(math.fsum(samples) / len(samples))
        kv_head = head // model.group_size
        scores[layer][kv_head] = max(scores[layer][kv_head], mean)
    return scores


def _finite(value: Any) -> float:
    """Convert a score; to be called before ``min`` or ``max``, which hide NaN."""
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"a score is {score}, not a finite number")
    return score


def _check(scores: Scores, model: ModelShape, path: Path) -> None:
    widths = {len(row) for row in scores}
    if len(scores) != model.num_layers or widths != {model.num_kv_heads}:
        width = "/".join(map(str, sorted(widths))) or "no"
        shape = f"{len(scores)} layers x {width} KV heads"
        refuse_model("profile", path, shape, model)
