# SPDX-License-Identifier: Apache-2.0
"""Needle prompts through NVIDIA's kvpress: the other half of ``quality_vs_kvpress.py``.

Runs in an environment of its own, which ``make bench-kvpress`` makes, so it imports
neither vLLM nor kvserve. Reads a job as JSON on stdin: the model, the prompts of each
length and the cells to measure. Writes one line of JSON a cell: replies, the share of
KV entries held when the prompt has been read, and the press's settings.

A press is used as kvpress documents it, as a context around the forward pass that
reads the prompt, question included. The first token of a reply is therefore the full
cache's, as with every method that reads the prompt before it evicts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from contextlib import nullcontext
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
)
from kvpress.presses.duo_attention_press import PATTERNS_DICT
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

_NOT_SETTINGS = {"press", "compression_ratio", "compression_ratio_", "streaming_mask"}
_PACKAGES = ("kvpress", "transformers", "torch")
_BY_RATIO = {
    press.__name__: press
    for press in (
        *(ExpectedAttentionPress, KeyDiffPress, KnormPress, KVzipPress),
        *(ObservedAttentionPress, SnapKVPress, StreamingLLMPress),
    )
}
_ADA = re.compile(r"AdaKVPress\((?P<inner>\w+)\)")


class GatedDuoAttentionPress(DuoAttentionPress):
    """DuoAttention with gates, sinks and window that are given, not downloaded."""

    def __init__(
        self, gates: list[list[float]], full_ratio: float, sinks: int, recent: int
    ):
        super().__init__(head_compression_ratio=1 - full_ratio)
        self.pattern = (sinks, recent, np.array(gates))

    def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
        """Stand in for the download of a pattern that the authors measured."""
        return self.pattern


def make_press(cell: dict[str, Any], job: dict[str, Any]) -> Any:
    """Make a press that keeps the cell's share.

    All else is at the press's defaults but for the cell's arguments.
    """
    name, ratio = cell["method"].partition(":")[0], 1 - cell["share"]
    arguments = cell["arguments"]
    if name == "none":
        return None
    if name in _BY_RATIO:
        return _BY_RATIO[name](compression_ratio=ratio, **arguments)
    adaptive = _ADA.fullmatch(name)
    if adaptive and adaptive["inner"] in _BY_RATIO:
        inner = _BY_RATIO[adaptive["inner"]]
        return AdaKVPress(inner(compression_ratio=ratio, **arguments))
    if name == "DuoAttentionPress":
        return DuoAttentionPress(head_compression_ratio=ratio)
    if name == "DuoAttentionPress, our gates":
        return GatedDuoAttentionPress(job["gates"], **arguments)
    raise SystemExit(f"--presses {name}: unknown")


def settings(press: Any) -> list[str]:
    """Name the settings of a press and of the press inside it."""
    if press is None:
        return []
    values = [
        f"{field.name}={getattr(press, field.name)}"
        for field in dataclasses.fields(press)
        if field.name not in _NOT_SETTINGS
    ]
    return values + settings(getattr(press, "press", None))


@lru_cache
def load(model: str, dtype: str, attention: str) -> Any:
    """Load the model with one of transformers' attention implementations."""
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()


def kept_share(model: Any, cache: DynamicCache, tokens: int) -> float:
    """Share of a full cache's entries that are neither gone nor masked for good."""
    attentions = [layer.self_attn for layer in model.model.layers]
    held = 0
    for attention, layer in zip(attentions, cache.layers, strict=True):
        masked = getattr(attention, "masked_key_indices", None)
        held += layer.keys.shape[1] * layer.keys.shape[2]
        held -= 0 if masked is None else len(masked[0])
    heads = model.config.num_key_value_heads
    return held / (len(attentions) * heads * tokens)


@torch.inference_mode()
def answer(
    model: Any, press: Any, token_ids: list[int], output: int, stop: set[int]
) -> tuple[list[int], float]:
    """Read a prompt under a press, then decode greedily from what it left."""
    cache = DynamicCache()
    with press(model) if press else nullcontext():
        result = model(
            input_ids=torch.tensor([token_ids]), past_key_values=cache, logits_to_keep=1
        )
    share = kept_share(model, cache, len(token_ids))
    reply: list[int] = []
    for position in range(len(token_ids), len(token_ids) + output):
        reply.append(int(result.logits[0, -1].argmax()))
        if reply[-1] in stop or len(reply) == output:
            break
        # The position is the token's own, however few entries are left.
        result = model(
            input_ids=torch.tensor([reply[-1:]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        )
    return reply, share


def measure(
    cell: dict[str, Any], job: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """Answer all prompts of one cell."""
    press = make_press(cell, job)
    eager = isinstance(press, ObservedAttentionPress)
    attention = "eager" if eager else "sdpa"
    model = load(job["model"], job["dtype"], attention)
    stop = {tokenizer.eos_token_id, *tokenizer.encode("\n", add_special_tokens=False)}
    prompts = job["prompts"][str(cell["length"])]
    answers = [answer(model, press, ids, job["output"], stop) for ids in prompts]
    return {
        "settings": ", ".join([*settings(press), f"{attention} attention"]),
        "kept": sum(share for _, share in answers) / len(answers),
        "replies": [
            tokenizer.decode(reply, skip_special_tokens=True).split("\n")[0]
            for reply, _ in answers
        ],
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def main() -> None:
    """Measure the cells that stdin asks for, in turn."""
    logging.disable_progress_bar()
    job = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    for cell in job["cells"]:
        if cell["method"] == "DuoAttentionPress" and job["model"] not in PATTERNS_DICT:
            result: dict[str, Any] = {"refused": "no pattern for this model"}
        else:
            result = measure(cell, job, tokenizer)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
