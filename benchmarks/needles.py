# SPDX-License-Identifier: Apache-2.0
"""Needle accuracy and memory of policies, through the engine, on the same prompts.

``--family numbers`` hides magic numbers in the manner of RULER, ``facts`` asks for
answers of several words. No wording, word or haystack of theirs was seen when the
shipped profile was measured. Prints Markdown.

    python benchmarks/needles.py --family facts --needles 16
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from transformers import AutoTokenizer
from vllm import SamplingParams

from kvserve import LLM
from kvserve.evaluation.families import FACTS, MAGIC_NUMBERS
from kvserve.evaluation.needles import build_prompt, score
from kvserve.models import resolve_model

_DEFAULT = [
    "full",
    "retrieval",
    "sink-recent",
]


_LENGTHS = [1024, 2048, 3072, 4000]
_FAMILIES = {"numbers": MAGIC_NUMBERS, "facts": FACTS}


def prompts(model: str, family: str, length: int, count: int) -> list[Any]:
    """Needle prompts of ``length`` tokens at depths spread over the haystack."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    depths = [(2 * number + 1) / (2 * count) for number in range(count)]
    return [
        build_prompt(tokenizer, _FAMILIES[family], length, depth, number)
        for number, depth in enumerate(depths)
    ]


def measure(spec: str, model: str, args: argparse.Namespace) -> dict[int, float]:
    """Mean score at each length; ``spec`` is ``POLICY`` or ``POLICY:{json}``."""
    policy, _, arguments = spec.partition(":")
    llm: Any = LLM(
        model,
        policy=policy,
        policy_args=json.loads(arguments or "{}"),
        dtype=args.dtype,
        max_model_len=max(args.lengths) + 128,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=args.output, stop=["\n"])
    accuracy = {}
    for length in args.lengths:
        needles = prompts(model, args.family, length, args.needles)
        outputs = llm.generate(
            [{"prompt_token_ids": needle.token_ids} for needle in needles],
            params,
            use_tqdm=True,
        )
        scores = [
            score(needle.answer, output.outputs[0].text)
            for needle, output in zip(needles, outputs, strict=True)
        ]
        accuracy[length] = sum(scores) / len(scores)
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    (group,) = manager.kv_cache_config.kv_cache_groups
    spec = group.kv_cache_spec
    plan = getattr(spec, "rule", spec.plan)
    kept = {n: plan.pages(n) * plan.page_size for n in args.lengths}
    lanes = plan.full.capacity.size
    cells = " | ".join(
        f"{accuracy[n]:.2f} ({min(1.0, kept[n] / (n * lanes)):.0%})"
        for n in args.lengths
    )
    print(f"| {spec} | {cells} |", flush=True)
    del llm, manager
    gc.collect()
    return accuracy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--policies", nargs="+", default=_DEFAULT, metavar="SPEC")
    parser.add_argument("--lengths", nargs="+", type=int, default=_LENGTHS)
    parser.add_argument("--family", choices=_FAMILIES, default="numbers")
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    heads = " | ".join(f"{length} tokens" for length in args.lengths)
    print(f"\n| policy | {heads} |\n|---{'|---' * len(args.lengths)}|")
    for spec in args.policies:
        measure(spec, resolve_model(args.model), args)


if __name__ == "__main__":
    main()
