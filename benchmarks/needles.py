# SPDX-License-Identifier: Apache-2.0
"""Needle accuracy and memory of policies, through the engine, on the same prompts.

``--family numbers`` hides magic numbers in the manner of RULER, ``facts`` asks for
answers of several words. No wording, word or haystack of theirs was seen when the
shipped profile was measured. Prints Markdown.

    python -m benchmarks.needles --family facts --needles 16
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from transformers import AutoTokenizer
from vllm import SamplingParams

from kvserve import LLM
from kvserve.models import resolve_model
from kvserve.processor import default_dtype
from kvserve.texts.families import FACTS, MAGIC_NUMBERS
from kvserve.texts.needles import NeedlePrompt, build_prompt, score

_DEFAULT = ["full", "retrieval", "sink-recent"]
LENGTHS = [1024, 2048, 3072, 4000]
FAMILIES = {"numbers": MAGIC_NUMBERS, "facts": FACTS}


def prompts(model: str, family: str, length: int, count: int) -> list[NeedlePrompt]:
    """Needle prompts of ``length`` tokens at depths spread over the haystack."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    depths = [(2 * number + 1) / (2 * count) for number in range(count)]
    return [
        build_prompt(tokenizer, FAMILIES[family], length, depth, number)
        for number, depth in enumerate(depths)
    ]


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``POLICY`` or ``POLICY:{json}``."""
    policy, _, arguments = spec.partition(":")
    return policy, json.loads(arguments or "{}")


def make_engine(
    model: str,
    policy: str,
    arguments: dict[str, Any],
    longest: int,
    dtype: str,
    stored: str = "auto",
) -> Any:
    """Start an engine for prompts of up to ``longest`` tokens.

    Args:
        stored: what pages hold, ``--kv-cache-dtype``.
    """
    return LLM(
        model,
        policy=policy,
        policy_args=arguments,
        dtype=dtype,
        kv_cache_dtype=stored,
        max_model_len=longest + 128,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        enable_prefix_caching=False,
    )


def replies(llm: Any, needles: list[NeedlePrompt], output: int) -> list[str]:
    """What the engine says, one line of at most ``output`` tokens each."""
    outputs = llm.generate(
        [{"prompt_token_ids": needle.token_ids} for needle in needles],
        SamplingParams(temperature=0, max_tokens=output, stop=["\n"]),
        use_tqdm=True,
    )
    return [output.outputs[0].text for output in outputs]


def mean_score(needles: list[NeedlePrompt], texts: list[str]) -> float:
    """Mean over the needles of the share of an answer that was found."""
    scores = [
        score(needle.answer, text) for needle, text in zip(needles, texts, strict=True)
    ]
    return sum(scores) / len(scores)


def kept_share(llm: Any, tokens: int, output: int) -> float:
    """Share of a full cache's entries that a prompt leaves held, in whole pages."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    (group,) = manager.kv_cache_config.kv_cache_groups
    rule = group.kv_cache_spec.rule
    held = rule.of_request(tokens, output).pages(tokens) * rule.page_size
    return min(1.0, held / (tokens * rule.full.num_lanes))


def measure(spec: str, stored: str, model: str, args: argparse.Namespace) -> None:
    """Print the row of one policy over pages of one type."""
    policy, arguments = parse(spec)
    longest = max(args.lengths)
    llm = make_engine(model, policy, arguments, longest, args.dtype, stored)
    cells = []
    for length in args.lengths:
        needles = prompts(model, args.family, length, args.needles)
        found = mean_score(needles, replies(llm, needles, args.output))
        kept = kept_share(llm, length, args.output)
        cells.append(f"{found:.2f} ({kept:.0%})")
    print(f"| {spec} | {stored} | {' | '.join(cells)} |", flush=True)
    del llm
    gc.collect()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--policies", nargs="+", default=_DEFAULT, metavar="SPEC")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--family", choices=FAMILIES, default="numbers")
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"], metavar="TYPE")
    args = parser.parse_args()
    heads = " | ".join(f"{length} tokens" for length in args.lengths)
    print(f"\n| policy | pages | {heads} |\n|---{'|---' * len(args.lengths)}|---|")
    for spec, stored in itertools.product(args.policies, args.kv_cache_dtype):
        measure(spec, stored, resolve_model(args.model), args)


if __name__ == "__main__":
    main()
