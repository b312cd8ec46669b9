# SPDX-License-Identifier: Apache-2.0
"""Find the heads that retrieval needs, in two ways.

*Scores* (Retrieval Head, arXiv 2404.15574, section 2). A head copies at a decode step
when the key it attends to most lies in the hidden answer and carries the very token
that the model emits. Its score on one needle is the number of answer tokens it copied
over the answer's length; its retrieval score is the mean over all needles that the
model found. A KV head takes the maximum of its group: one query head that needs the
cache is reason enough to keep it.

*Gates* (``gates.py``) find KV heads that the answer depends on whether they copy or
not, such as those that lead to the needle. Where both are measured, the policy ranks
by gates.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.errors import UserError
from kvserve.profiling.copy_score import Instance, TopKeyProbe, run_instance
from kvserve.profiling.fast import profile_fast
from kvserve.profiling.gates import GateSettings, gates_so_far, train_gates
from kvserve.profiling.heat_map import draw_heat_map
from kvserve.profiling.runs import (
    about_model,
    add_files,
    add_flags,
    appending,
    at_least_one,
    files_of,
    finished,
    load_model,
    prose,
    read_flags,
    rounded,
    store_path,
    to_lines,
)
from kvserve.texts.families import PROFILING
from kvserve.texts.needles import NeedlePrompt, build_prompt
from policies.head_scores import PROFILE_FORMAT

UNFINISHED = "retrieval.unfinished.json"
"""What a run that was stopped leaves: a profile of what it has found so far."""
_EXAMPLE = """examples:
  kvserve profile retrieval --fast Qwen/Qwen2.5-0.5B-Instruct --out profiles/qwen
  kvserve profile retrieval Qwen/Qwen2.5-0.5B-Instruct --out profiles/qwen
  kvserve serve Qwen/Qwen2.5-0.5B-Instruct --policy retrieval \\
      --policy-arg profile=profiles/qwen/retrieval.json

`kvserve serve --policy retrieval` makes a fast profile by itself. Ctrl-C shows what the
long one has found so far; the same command goes on.
"""


@dataclass(frozen=True)
class RetrievalSettings:
    """How much to measure: ``lengths * depths * needles`` instances, then the gates.

    The paper runs 600 instances of up to 50 000 tokens. The defaults are 120 of up to
    4096 and 100 gate steps: for the embedded model on two idle CPU cores about 15
    minutes each.

    Attributes:
        min_length: Tokens of the shortest prompt.
        max_length: Tokens of the longest prompt.
        lengths: Number of prompt lengths, equally spaced between these two.
        depths: Number of needle positions, equally spaced from beginning to end.
        needles: Needles for each length and depth, all different; wordings take turns.
        max_decode_tokens: Longest answer.
        min_recall: An instance counts only if the answer's recall is above this.
        threshold: Score from which the report calls a head a retrieval head.
        seed: Draws the needles and the passages they hide in.
        gate_steps: Prompts that the gates are trained on; 0 leaves them out.
        gate_penalty: What an open gate costs, against the KL divergence in nats.
        gate_length: Tokens of the longest prompt of the gates.
    """

    min_length: int = 512
    max_length: int = 4096
    lengths: int = 8
    depths: int = 5
    needles: int = 3
    max_decode_tokens: int = 32
    min_recall: float = 0.5
    threshold: float = 0.1
    seed: int = 0
    gate_steps: int = 100
    gate_penalty: float = 0.5
    gate_length: int = 1792

    def __post_init__(self) -> None:
        at_least_one(self, "lengths", "depths", "needles", "max_decode_tokens")
        if not 128 <= self.min_length <= self.max_length:
            raise UserError(
                f"--min-length {self.min_length} --max-length {self.max_length}: the "
                "shortest needs at least 128 tokens, the longest no fewer than that"
            )
        if self.gate_steps < 0 or self.gate_penalty < 0:
            raise UserError(
                f"--gate-steps {self.gate_steps} --gate-penalty {self.gate_penalty}: "
                "must not be negative"
            )
        if self.gate_steps and self.gate_length < 512:
            raise UserError(
                f"--gate-length {self.gate_length}: must be at least 512; or leave the "
                "gates out with --gate-steps 0"
            )

    @property
    def instances(self) -> int:
        return self.lengths * self.depths * self.needles


def profile_retrieval(
    model_dir: str,
    settings: RetrievalSettings,
    out_dir: Path,
    progress: bool = True,
    data: Path | None = None,
) -> Path:
    """Measure the retrieval score of every head and write it to ``out_dir``.

    Finished instances are remembered in the cache directory: a run that was stopped
    goes on where it was, and leaves ``UNFINISHED`` in ``out_dir``.

    Args:
        data: Prose to hide needles in; ``None`` is the book that ships.

    Returns:
        The path of ``retrieval.json``; ``retrieval.png`` is written beside it.

    Raises:
        UserError: the model cannot be loaded or measured.
    """
    text, data_name = prose(data)
    needed = {
        "--max-length": settings.max_length + settings.max_decode_tokens,
        "--gate-length": settings.gate_length if settings.gate_steps else 0,
    }
    model, tokenizer = load_model(model_dir, needed)
    done: list[Instance] = []
    out_dir.mkdir(parents=True, exist_ok=True)
    path, unfinished = out_dir / "retrieval.json", out_dir / UNFINISHED
    heads = model.config.get_text_config().num_key_value_heads
    entries = about_model(model_dir, model, heads)
    about = _About(entries, settings, data_name)
    try:
        _measure(model_dir, model, tokenizer, settings, text, progress, done)
        if not _kept(done, settings):
            raise UserError(
                f"{entries['model']} found none of {len(done)} needles: try a smaller "
                "--max-length, or --data with text that the model reads well"
            )
        gates = _gates(model_dir, model, tokenizer, settings, text, progress)
    except KeyboardInterrupt:
        if _kept(done, settings):
            gates = _gates_so_far(model_dir, settings, text)
            unfinished.write_text(to_lines(about.profile(done, gates)))
        raise
    profile = about.profile(done, gates)
    path.write_text(to_lines(profile))
    draw_heat_map(profile, out_dir / "retrieval.png")
    unfinished.unlink(missing_ok=True)
    return path


def _kept(done: list[Instance], settings: RetrievalSettings) -> list[Instance]:
    """The needles that the model found, which alone count."""
    return [instance for instance in done if instance.recall > settings.min_recall]


@dataclass(frozen=True)
class _About:
    """What a profile says besides what was found."""

    model: dict[str, Any]
    settings: RetrievalSettings
    data: str

    def profile(self, done: list[Instance], gates: dict[str, Any]) -> dict[str, Any]:
        """Lay out what was found as it is written to the file."""
        kept, model = _kept(done, self.settings), self.model
        scores = torch.zeros(model["num_layers"], model["num_query_heads"])
        for instance in kept:
            for (layer, head), value in instance.copied.items():
                scores[layer, head] += value / len(kept)
        return {
            "format": PROFILE_FORMAT,
            **model,
            "query_head_scores": rounded(scores),
            "kv_head_scores": rounded(kv_head_scores(scores, model["num_kv_heads"])),
            **gates,
            "settings": {**dataclasses.asdict(self.settings), "data": self.data},
            "instances": {"run": len(done), "kept": len(kept)},
        }


def kv_head_scores(query_head_scores: Tensor, num_kv_heads: int) -> Tensor:
    """Reduce ``[R, H_q]`` to ``[R, H_kv]``: the maximum of each group."""
    num_layers = query_head_scores.shape[0]
    return query_head_scores.view(num_layers, num_kv_heads, -1).amax(dim=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``kvserve profile retrieval``."""
    parser.description = (
        "Hide made-up facts in long text, ask for them, and score each attention head\n"
        "by how much of the answer it copies from the cache (arXiv 2404.15574)."
    )
    parser.epilog = _EXAMPLE
    add_files(parser, "retrieval", "the needles")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a few backward passes instead; other flags but --out change nothing",
    )
    add_flags(parser, RetrievalSettings, _HELP)


_HELP = {
    "min_length": "tokens of the shortest prompt",
    "max_length": "tokens of the longest prompt",
    "lengths": "number of prompt lengths, equally spaced between the two",
    "depths": "number of needle positions, equally spaced from beginning to end",
    "needles": "different needles for each length and depth",
    "max_decode_tokens": "longest answer in tokens",
    "min_recall": "leave out a needle if the answer has no more than this share of it",
    "threshold": "score from which a head counts as a retrieval head in the report",
    "seed": "draws the needles and the text around them",
    "gate_steps": "prompts to train the gates on; 0 leaves them out",
    "gate_penalty": "what an open gate costs: more keeps fewer heads apart",
    "gate_length": "tokens of the longest prompt of the gates",
}


def run(args: argparse.Namespace) -> int:
    """Run ``kvserve profile retrieval`` and print what was found."""
    settings = read_flags(args, RetrievalSettings)
    model_dir, out_dir = files_of(args)
    if args.fast:
        print(f"wrote {profile_fast(model_dir, out_dir)}")
        return 0
    try:
        path = profile_retrieval(model_dir, settings, out_dir, data=args.data)
    except KeyboardInterrupt:
        _show_unfinished(out_dir)
        return 130
    profile = json.loads(path.read_text())
    scores = torch.tensor(profile["query_head_scores"])
    found = int((scores >= settings.threshold).sum())
    print(f"{found} of {scores.numel()} query heads score {settings.threshold} or more")
    print(f"{profile['instances']['kept']} of {settings.instances} needles were found")
    print(f"wrote {path}")
    return 0


def _show_unfinished(out_dir: Path) -> None:
    """Say what a run that was stopped has found, and how it goes on."""
    path = out_dir / UNFINISHED
    if not path.exists():
        print("\nkvserve: stopped before the first needle; the same command goes on")
        return
    profile = json.loads(path.read_text())
    kind = "kv_head_gates" if "kv_head_gates" in profile else "kv_head_scores"
    best = sorted(
        (
            (score, f"{layer}-{head}")
            for layer, row in enumerate(profile[kind])
            for head, score in enumerate(row)
        ),
        reverse=True,
    )[:8]
    shown = ", ".join(f"{name} ({score:.2f})" for score, name in best)
    print(
        f"\nkvserve: stopped after {profile['instances']['run']} needles, of which "
        f"{profile['instances']['kept']} were found. Best KV heads so far, layer-head: "
        f"{shown}. {path} can be served as it is; the same command goes on."
    )


def _measure(
    model_dir: str,
    model: Any,
    tokenizer: Any,
    settings: RetrievalSettings,
    text: str,
    progress: bool,
    instances: list[Instance],
) -> None:
    """Run the instances that the cache directory does not hold yet; append to all."""
    store = store_path(model_dir, dataclasses.astuple(settings), text)
    done = finished(store, Instance.from_json)
    probe = TopKeyProbe()
    probe.attach(model)
    bar = tqdm(total=settings.instances, unit="needle", disable=not progress)
    with bar, appending(store) as write:
        for prompt in _prompts(tokenizer, settings, text):
            key = hashlib.sha256(str(prompt.token_ids).encode()).hexdigest()[:16]
            if key not in done:
                limit = settings.max_decode_tokens
                done[key] = run_instance(model, tokenizer, probe, prompt, limit)
                write(done[key].to_json(key))
            instances.append(done[key])
            found = len(_kept(instances, settings))
            bar.set_postfix_str(f"{found} of {len(instances)} found")
            bar.update()


def _gates(
    model_dir: str,
    model: Any,
    tokenizer: Any,
    settings: RetrievalSettings,
    text: str,
    progress: bool,
) -> dict[str, Any]:
    """The profile's entry of gates, empty if they are not asked for."""
    if not settings.gate_steps:
        return {}
    asked, store = _gate_run(model_dir, settings, text)
    gates = train_gates(model, tokenizer, asked, text, store, progress)
    return {"kv_head_gates": rounded(gates)}


def _gates_so_far(
    model_dir: str, settings: RetrievalSettings, text: str
) -> dict[str, Any]:
    """The entry of gates whose training was stopped, empty before its middle."""
    _, store = _gate_run(model_dir, settings, text)
    gates = gates_so_far(store, settings.gate_steps)
    return {} if gates is None else {"kv_head_gates": rounded(gates)}


def _gate_run(
    model_dir: str, settings: RetrievalSettings, text: str
) -> tuple[GateSettings, Path]:
    """How the gates are trained, and the file that remembers their training."""
    asked = GateSettings(
        settings.gate_steps,
        settings.gate_penalty,
        settings.gate_length,
        settings.seed,
    )
    store = store_path(model_dir, dataclasses.astuple(asked), text)
    return asked, store.with_suffix(".pt")


def _prompts(
    tokenizer: Any, settings: RetrievalSettings, text: str
) -> Iterator[NeedlePrompt]:
    lengths = torch.linspace(
        settings.min_length, settings.max_length, settings.lengths
    ).tolist()
    depths = torch.linspace(0, 1, settings.depths).tolist()
    index = 0
    for length in lengths:
        for depth in depths:
            for _ in range(settings.needles):
                yield build_prompt(
                    tokenizer,
                    PROFILING,
                    round(length),
                    depth,
                    index,
                    seed=settings.seed,
                    text=text,
                )
                index += 1
