# SPDX-License-Identifier: Apache-2.0
"""Ways to find the heads that retrieve: how long they take, what they find.

    python -m benchmarks.profiles time          a random model of 0.5B parameters
    python -m benchmarks.profiles make DIR      profiles of a model
    python -m benchmarks.profiles needles DIR   serve each of them, ask for needles
    ... --model DIR                             of another model than the embedded one

Profiles: ``shipped``, if one ships, is what ``kvserve profile retrieval`` measures in
half an hour with its defaults, gates; ``scores`` are its copy scores alone; ``fast`` is
``kvserve profile retrieval --fast``; ``repeats`` are the echo and induction heads of
RazorAttention (arXiv 2407.15891): a thousand random tokens four times over, and the
attention that each head pays to earlier copies of a token and to what followed them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvserve.models import embedded_model
from kvserve.profiling.attention_hook import PromptAttention
from kvserve.profiling.fast import profile_fast
from kvserve.profiling.retrieval import kv_head_scores
from kvserve.profiling.runs import load_model, profile_folder, rounded, to_lines

_PERIOD = 1000
_REPEATS = 4
_QUERIES = 256
_BUDGETS = ("0.5", "0.25", "0.125")
_NAMES = ("shipped", "scores", "fast", "repeats")


class RepeatProbe(PromptAttention):
    """Causal attention that notes what heads pay to earlier copies of a token."""

    name = "benchmark_repeats"

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.echo: list[Tensor] = []
        self.induction: list[Tensor] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        logits = query[0, :, self.queries] @ keys.transpose(1, 2) * scale
        later = torch.arange(keys.shape[1]) > self.queries[:, None]
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
        for found, shift in ((self.echo, 0), (self.induction, 1)):
            copies = self.queries[:, None] - _PERIOD * torch.arange(1, _REPEATS) + shift
            paid = weights.gather(2, copies.expand(len(weights), -1, -1))
            found.append(paid.sum(2).mean(1))
        return output


def repeat_scores(model: Any, tokenizer: Any) -> Tensor:
    """The greater of echo and induction of each KV head, ``[R, H_kv]``."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    drawn = torch.randint(config.vocab_size, (_PERIOD,), generator=generator)
    first = tokenizer.bos_token_id
    begin = torch.tensor([] if first is None else [first]).long()
    tokens = torch.cat([begin, drawn.repeat(_REPEATS)])
    last = len(tokens) - 1 - torch.randperm(_PERIOD, generator=generator)[:_QUERIES]
    probe = RepeatProbe(last)
    probe.attach(model)
    with torch.inference_mode():
        model(tokens[None], use_cache=False, logits_to_keep=1)
    best = torch.maximum(torch.stack(probe.echo), torch.stack(probe.induction))
    return kv_head_scores(best, config.num_key_value_heads)


def make(folder: Path, model_dir: str) -> None:
    """Write the profiles that are compared, as ``NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    profiles: dict[str, dict[str, Any]] = {}
    shipped = profile_folder(Path(model_dir).name) / "retrieval.json"
    if shipped.exists():
        profiles["shipped"] = found = json.loads(shipped.read_text())
        profiles["scores"] = {k: found[k] for k in found if k != "kv_head_gates"}
    began = time.perf_counter()
    fast = profiles["fast"] = json.loads(profile_fast(model_dir, folder).read_text())
    print(f"fast: {time.perf_counter() - began:.0f} s with loading")
    model, tokenizer = load_model(model_dir, {})
    began = time.perf_counter()
    scores = rounded(repeat_scores(model, tokenizer), 6)
    print(f"repeats: {time.perf_counter() - began:.0f} s without loading")
    others = {key: fast[key] for key in fast if key != "kv_head_gates"}
    profiles["repeats"] = others | {"kv_head_scores": scores}
    for name, profile in profiles.items():
        (folder / f"{name}.json").write_text(to_lines(profile))


def needles(folder: Path, model_dir: str, length: int, samples: int) -> int:
    """Serve each profile at each budget, ask for needles, print a table."""
    command = [sys.executable, "-m", "kvserve.cli", "eval", model_dir]
    command += ["--length", str(length), "--samples", str(samples)]
    command += ["--out", str(folder)]
    for budget in _BUDGETS:
        for path in (folder / f"{name}.json" for name in _NAMES):
            if path.exists():
                command += ["--policy", f"retrieval:budget={budget},profile={path}"]
    return subprocess.run(command, check=False).returncode


def measure_time() -> None:
    """Time the fast profile on random weights of Qwen2.5-0.5B's shape."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "random-0.5B"
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for file in embedded_model().glob("*token*"):
            shutil.copy(file, folder)
        began = time.perf_counter()
        profile_fast(str(folder), Path(name))
        seconds = time.perf_counter() - began
    print(f"fast, 0.5B parameters, {torch.get_num_threads()} threads: {seconds:.0f} s")


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("time")
    making, asking = kinds.add_parser("make"), kinds.add_parser("needles")
    for kind in (making, asking):
        kind.add_argument("folder", type=Path)
        kind.add_argument("--model", default=None)
    asking.add_argument("--length", type=int, default=2048)
    asking.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    if args.kind == "time":
        measure_time()
        return 0
    model_dir = args.model or str(embedded_model())
    if args.kind == "make":
        make(args.folder, model_dir)
    else:
        return needles(args.folder, model_dir, args.length, args.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
