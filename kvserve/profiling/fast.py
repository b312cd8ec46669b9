# SPDX-License-Identifier: Apache-2.0
"""Find the heads that an answer needs by a few backward passes.

RazorAttention (arXiv 2407.15891) looks for heads that repeat, on random tokens: echo
and induction heads. That takes one forward pass, but tells only who copies, not whose
copy the answer needs. This takes the measure of ``influence.py`` instead: a prompt
hides made-up facts, its reply recites them, and one backward pass estimates for every
KV head by how many nats the answers move when the head alone sees sinks and a window.
``benchmarks/profiles.py`` lays both beside the long profile.

A profile that ``kvserve serve`` makes by itself lies in the cache folder, under the
identity of the model: its configuration and weight files.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.errors import UserError
from kvserve.models import cache_dir
from kvserve.profiling.influence import BLOCK, InfluenceProbe, measure_influence
from kvserve.profiling.recital import Recital, build_recital
from kvserve.profiling.runs import about_model, load_model, to_lines
from kvserve.texts.families import PROFILING
from kvserve.texts.haystack import load_book
from policies.budgets import PolicySpec
from policies.head_scores import PROFILE_FORMAT, has_shipped_profile

_PROMPTS = 3
_TOKENS = 1024
_FACTS = 8
_WINDOW_BLOCKS = 4


def profile_fast(model_dir: str, out_dir: Path, progress: bool = True) -> Path:
    """Measure every KV head and write ``retrieval.json``.

    Returns:
        Its path. A KV head's score is what its window would cost, in nats an answer
        token.

    Raises:
        UserError: the model cannot be loaded, or is too small for the prompts.
    """
    model, tokenizer = load_model(model_dir, {"--fast": _TOKENS})
    scores = measure_windows(model, tokenizer, progress)
    profile = {
        "format": PROFILE_FORMAT,
        **about_model(model_dir, model, scores.shape[1]),
        "kv_head_scores": [
            [float(f"{score:.4g}") for score in layer] for layer in scores.tolist()
        ],
        "settings": {
            "measure": "influence",
            "prompts": _PROMPTS,
            "tokens": _TOKENS,
            "window": _WINDOW_BLOCKS * BLOCK,
        },
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "retrieval.json"
    # Whoever finds the file finds all of it.
    unfinished = path.with_suffix(".part")
    unfinished.write_text(to_lines(profile))
    unfinished.replace(path)
    return path


def measure_windows(model: Any, tokenizer: Any, progress: bool = True) -> Tensor:
    """Return what a window would cost each KV head, ``[R, H_kv]``, in nats.

    Raises:
        UserError: the prompts do not fit.
    """
    text = load_book(PROFILING.book)
    probe = InfluenceProbe("joint")
    probe.attach(model)
    costs = []
    name = "which heads retrieve"
    for item in tqdm(range(_PROMPTS), name, unit="prompt", disable=not progress):
        recital = _recital(tokenizer, item, text)
        curves = measure_influence(model, probe, recital, seed=item)
        costs.append(curves[..., _WINDOW_BLOCKS])
    return torch.stack(costs).mean(0)


def _recital(tokenizer: Any, item: int, text: str) -> Recital:
    """A prompt and its reply of whole blocks; newlines fill the last one up."""
    recital = build_recital(tokenizer, PROFILING, _TOKENS, _FACTS, f"fast/{item}", text)
    token_ids = recital.token_ids[:_TOKENS]
    missing = _TOKENS - len(token_ids)
    return Recital(token_ids + token_ids[-1:] * missing, recital.answers)


def cached_profile(model_dir: str) -> Path:
    """Where the fast profile of a model is, or will be, kept.

    Raises:
        UserError: there is no such model.
    """
    folder = f"{Path(model_dir).name}-{_identity(model_dir)}"
    return cache_dir() / "profiles" / folder / "retrieval.json"


def _identity(model_dir: str) -> str:
    """Tell a model from any other, by its configuration and weight files."""
    folder = Path(model_dir)
    if folder.is_dir():
        config = folder / "config.json"
        what: list[object] = [config.read_text() if config.is_file() else ""]
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            stat = path.stat()
            what.append((path.name, stat.st_size, stat.st_mtime_ns))
    else:
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(model_dir)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"MODEL {model_dir}: cannot be loaded ({reason})") from None
        what = [found.to_json_string(), getattr(found, "_commit_hash", None)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def profile_arguments(
    policy: str, arguments: dict[str, Any], model_dir: str, *, make: bool
) -> dict[str, Any]:
    """Add the fast profile of a model to a policy's arguments, if it needs one.

    It does if the policy is ``retrieval``, no profile was named and none ships.

    Args:
        policy: as typed.
        make: measure the model if that has not been done; else leave it out.

    Raises:
        UserError: the policy is malformed, or the model cannot be measured.
    """
    spec = PolicySpec.parse(policy, arguments)
    named = dict(spec.from_file) | dict(spec.own)
    if spec.rule != "retrieval" or named.get("profile") is not None:
        return arguments
    if has_shipped_profile(Path(model_dir).name):
        return arguments
    path = cached_profile(model_dir)
    if not path.exists():
        if not make:
            return arguments
        _measure_apart(model_dir, path)
    return {**arguments, "profile": str(path)}


def _measure_apart(model_dir: str, path: Path) -> None:
    """Measure in a process of its own, which gives all its memory back."""
    print(
        f"kvserve: no profile ships for {Path(model_dir).name}: measuring which heads "
        "retrieve, once",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "kvserve.cli", "profile", "retrieval", model_dir]
    command += ["--fast", "--out", str(path.parent)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError(
            f"--policy retrieval: the heads of {Path(model_dir).name} could not be "
            "measured, see above; give a profile=FILE, or choose a policy that needs "
            "none, such as sink-recent:budget=25%"
        )
