# SPDX-License-Identifier: Apache-2.0
"""Find a span for every KV head (MoA, arXiv 2406.14909, section 4).

Three steps: measure what each window of each head would cost, at several lengths
(``influence.py``); choose rules that cost the least at all of them together
(``elastic.py``); of the plans that are left, keep the one that is nearest to the dense
model on longer prompts than any that was measured.

Where we differ from the authors: one rule for each KV head, not query head, for that is
what a cache can hold; prompts that hide made-up facts in prose, whose replies recite
them, instead of news summaries; and the measure (see ``influence.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from kvserve.profiling.heat_map import draw_spans
from kvserve.profiling.runs import (
    about_model,
    add_files,
    add_flags,
    files_of,
    prose,
    read_flags,
    to_lines,
)
from kvserve.profiling.span_search import MoASettings, SpanSearch
from kvserve.units import format_bytes
from policies.moa import PLAN_FORMAT

_EXAMPLE = """example:
  kvserve profile moa Qwen/Qwen2.5-0.5B-Instruct --out profiles/qwen
  kvserve serve Qwen/Qwen2.5-0.5B-Instruct --policy moa \\
      --policy-arg plan=profiles/qwen/moa.json --policy-arg budget=0.5
"""


def profile_moa(
    model_dir: str,
    settings: MoASettings,
    out_dir: Path,
    progress: bool = True,
    data: Path | None = None,
) -> Path:
    """Find the plans of a model and write them to ``out_dir``.

    Finished prompts are remembered in the cache directory: a run that was stopped goes
    on where it was.

    Args:
        data: Prose to hide facts in; ``None`` is the book that ships.

    Returns:
        The path of ``moa.json``; ``moa.png`` is written beside it.

    Raises:
        UserError: the model cannot be loaded or measured, or no plan is that small.
    """
    text, data_name = prose(data)
    search = SpanSearch(model_dir, settings, text, progress)
    if progress:
        print(
            f"the longest prompt, of {settings.lengths[-1]} tokens, takes about "
            f"{format_bytes(search.memory())} of memory besides the model",
            flush=True,
        )
    plans = search.plans(search.influence())
    distances = search.validate(plans)
    records = [
        plan.to_record(distance)
        for plan, distance in zip(plans, distances, strict=True)
    ]
    profile = {
        "format": PLAN_FORMAT,
        **about_model(model_dir, search.model, search.config.num_key_value_heads),
        "plans": [_nearest(records, budget) for budget in settings.budgets],
        "pareto": records,
        "settings": {**dataclasses.asdict(settings), "data": data_name},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "moa.json"
    path.write_text(to_lines(profile))
    draw_spans(profile, out_dir / "moa.png")
    return path


def _nearest(records: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Of a budget's plans, the one whose answers are nearest to the dense model's."""
    of_budget = [record for record in records if record["budget"] == budget]
    return min(of_budget, key=lambda record: record["validation"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``kvserve profile moa``."""
    parser.description = (
        "Measure what a model's answers lose when a head sees only the first tokens\n"
        "and the last, and choose a span for each head (arXiv 2406.14909)."
    )
    parser.epilog = _EXAMPLE
    add_files(parser, "moa", "facts")
    add_flags(parser, MoASettings, _HELP)


_HELP = {
    "lengths": "tokens of the prompts that heads are measured on",
    "items": "prompts at each length",
    "budgets": "shares of the KV cache, a plan for each",
    "intervals": "parts of each length's range of loss: more finds more plans",
    "validation_length": "tokens of the prompts that plans are compared on",
    "validation_items": "how many of these prompts",
    "measure": "what hiding keys costs: joint, or the paper's sum of |E|, entries",
    "seed": "draws the facts, the text around them and the replies",
}


def run(args: argparse.Namespace) -> int:
    """Run ``kvserve profile moa`` and print what was found."""
    settings = read_flags(args, MoASettings)
    model_dir, out_dir = files_of(args)
    path = profile_moa(model_dir, settings, out_dir, data=args.data)
    for plan in json.loads(path.read_text())["plans"]:
        kept = ", ".join(f"{x:.1%} at {n}" for n, x in plan["density"].items())
        print(
            f"budget {plan['budget']}: keeps {kept} tokens; "
            f"KL divergence {plan['validation']:.4f} at {settings.validation_length}"
        )
    print(f"wrote {path}")
    return 0
