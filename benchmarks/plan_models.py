# SPDX-License-Identifier: Apache-2.0
"""What one request of well-known models takes: stock vLLM, `full` and `retrieval`.

Computed from configurations alone: no weights, no tokenizer, no engine. Writes the
table of docs/models.md.

    python -m benchmarks.plan_models
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from benchmarks.tables import Table
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.layers import model_shape_of, state_bytes
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import check_start, page_bytes_of
from kvserve.engine.start.support import rule_of
from kvserve.units import format_bytes
from policies.head_scores import PROFILE_FORMAT
from tests.reference.released_models import MODELS, Released

PAGE = Path("docs/models.md")
LENGTHS = (32768, 131072)
SHARE = "25%"
STOCK_BLOCK = 16
STEP = 2048
REQUESTS = "requests"
"""Marks the table in the page."""


@dataclass(frozen=True)
class Taken:
    """Bytes that one request of ``tokens`` tokens holds, states included."""

    tokens: int
    stock: int
    full: int
    retrieval: int


def configured(folder: Path, policy: str, tokens: int) -> VllmConfig:
    """Configure a server of ``policy`` whose longest request has ``tokens`` tokens."""
    options = engine_options(
        PolicySettings(policy),
        {
            "model": str(folder),
            "max_model_len": tokens,
            "max_num_seqs": 1,
            "max_num_batched_tokens": STEP,
            "enable_prefix_caching": False,
        },
    )
    return check_start(options)


def write_scores(model: Released, folder: Path) -> Path:
    """Write random head scores of the model's shape: a budget asks for an order."""
    draw = Random(0)
    heads, layers = range(model.kv_heads), range(model.cached)
    scores = [[draw.random() for _ in heads] for _ in layers]
    path = folder / "scores.json"
    path.write_text(json.dumps({"format": PROFILE_FORMAT, "kv_head_scores": scores}))
    return path


def of_one_request(config: VllmConfig) -> int:
    """Bytes of states that one request has."""
    return state_bytes(config) // (config.scheduler_config.max_num_seqs + 1)


def held(config: VllmConfig, tokens: int) -> int:
    """Bytes that a request of ``tokens`` tokens ends with under the config's policy."""
    return rule_of(config).pages(tokens) * page_bytes_of(config) + of_one_request(
        config
    )


def stock(config: VllmConfig) -> int:
    """Bytes that stock vLLM sets aside for the longest request, by its own classes."""
    shape = model_shape_of(config)
    of_layer = {
        "block_size": STOCK_BLOCK,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "dtype": config.model_config.dtype,
    }
    specs: list[AttentionSpec] = [
        SlidingWindowSpec(**of_layer, sliding_window=local.tokens)
        if local
        else FullAttentionSpec(**of_layer)
        for local in shape.local or (None,) * shape.num_layers
    ]
    cached = sum(spec.max_memory_usage_bytes(config) for spec in specs)
    return cached + of_one_request(config)


def taken(folder: Path, scores: Path) -> list[Taken]:
    """Compute what a request of each length takes of the model in ``folder``."""
    found = []
    for tokens in LENGTHS:
        full = configured(folder, "full", tokens)
        policy = f"retrieval:profile={scores},budget={SHARE}"
        ours = configured(folder, policy, tokens)
        found.append(Taken(tokens, stock(full), held(full, tokens), held(ours, tokens)))
    return found


def row(model: Released, found: list[Taken]) -> list[str]:
    """Lay out what was computed for one model."""
    sizes = [
        f"{format_bytes(size)}"
        for one in found
        for size in (one.stock, one.full, one.retrieval)
    ]
    return [model.name, model.structure, *sizes]


def table(rows: list[list[str]]) -> str:
    """Return the table of docs/models.md."""
    heads = [
        f"{tokens // 1024}k: {what}"
        for tokens in LENGTHS
        for what in ("stock", "`full`", f"`retrieval`, {SHARE}")
    ]
    return Table("", ["model", "cache", *heads], rows).body()


def between_marks(text: str, name: str) -> tuple[str, str, str]:
    """Split a page around what is generated, the marks left with their sides."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(first)
    inside, _, after = rest.partition(last)
    return before + first, inside, last + after


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for model in MODELS:
            folder = model.write(Path(directory))
            rows.append(row(model, taken(folder, write_scores(model, folder))))
            print(" | ".join(rows[-1]), flush=True)
    before, _, after = between_marks(PAGE.read_text(), REQUESTS)
    PAGE.write_text(before + table(rows) + after)


if __name__ == "__main__":
    main()
