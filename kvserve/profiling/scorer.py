# SPDX-License-Identifier: Apache-2.0
"""Learn which tokens a model will need, and how many of them each head.

Texts with made-up facts in them are read and repeated (``repetition.py``); what the
repetition looked at tells what to keep. A network for each layer learns to foretell it
from keys and values alone (``score_training.py``). Then prompts whose replies recite
facts tell what it would cost each head to keep no more than its best few tokens
(``history_cost.py``), which becomes its part of a budget (``head_shares.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvserve.errors import UserError
from kvserve.models import add_model
from kvserve.profiling.head_shares import share_ladder
from kvserve.profiling.runs import (
    about_model,
    add_flags,
    at_least_one,
    files_of,
    load_model,
    prose,
    read_flags,
    rounded,
    store_path,
    to_lines,
)
from kvserve.profiling.scorer_steps import ScorerRun, save_whole
from policies.expected_attention import FREQUENCIES, QUERIES_FORMAT
from policies.history import HISTORY_FORMAT
from policies.kvzap import SCORER_FORMAT, Network

_LEAST_TOKENS = 384
_EXAMPLE = """examples:
  kvserve profile scorer Qwen/Qwen2.5-0.5B-Instruct --out profiles/qwen
  kvserve serve Qwen/Qwen2.5-0.5B-Instruct --policy kvzap:budget=12.5% \\
      --policy-arg weights=profiles/qwen/kvzap.safetensors \\
      --policy-arg profile=profiles/qwen/history.json

Ctrl-C stops; the same command goes on.
"""


_About = dict[str, Any]


@dataclass(frozen=True)
class ScorerSettings:
    """How much to read, and how to learn from it.

    The defaults take the embedded model on two idle CPU cores about a quarter
    of an hour.

    Attributes:
        texts: Texts to read and repeat.
        tokens: Tokens of each, its prompt included; with the repetition nearly twice.
        facts: Made-up facts in each.
        width: Hidden units of each layer's network.
        epochs: How often each text is learned from.
        prompts: Prompts to weigh heads by, as long as texts.
        recited: Made-up facts in each, which its reply recites.
        seed: Draws texts and facts, and what networks start with.
    """

    texts: int = 32
    tokens: int = 1536
    facts: int = 8
    width: int = 256
    epochs: int = 12
    prompts: int = 16
    recited: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        at_least_one(self, *(name for name in names if name != "seed"))
        if self.tokens < _LEAST_TOKENS:
            raise UserError(
                f"--tokens {self.tokens}: must be at least {_LEAST_TOKENS}, so that "
                "groups of 128 tokens leave a window"
            )


_HELP = {
    "texts": "texts to read and repeat",
    "tokens": "tokens of each; the model reads nearly twice as many at once",
    "facts": "made-up facts hidden in each",
    "width": "hidden units of each layer's network",
    "epochs": "how often each text is learned from",
    "prompts": "prompts to weigh heads by, as long as texts",
    "recited": "made-up facts in each, which its reply recites",
    "seed": "draws texts and facts, and what networks start with",
}


def profile_scorer(
    model_dir: str,
    settings: ScorerSettings,
    out_dir: Path,
    progress: bool = True,
    data: Path | None = None,
) -> tuple[Path, Path, Path]:
    """Train a scorer, and share a budget out over heads.

    What is finished is remembered in the cache directory: a run that was stopped goes
    on where it was. For each text of the embedded model that takes 36 MiB, which are
    given back at the end.

    Args:
        data: Prose to hide facts in; ``None`` is the book that ships.

    Returns:
        The paths of ``kvzap.safetensors``, ``queries.safetensors`` and
        ``history.json``.

    Raises:
        UserError: the model cannot be loaded or measured.
    """
    text, data_name = prose(data)
    model, tokenizer = load_model(model_dir, {"--tokens": 2 * settings.tokens})
    store = store_path(model_dir, dataclasses.astuple(settings), text).with_suffix("")
    store.mkdir(exist_ok=True)
    run = ScorerRun(
        model,
        tokenizer,
        text,
        settings.tokens,
        settings.facts,
        settings.recited,
        settings.seed,
        store,
        progress,
    )
    texts = run.read(settings.texts)
    networks = run.train(texts, settings.width, settings.epochs)
    shares = share_ladder(run.weigh(networks, settings.prompts))
    config = model.config.get_text_config()
    about = about_model(model_dir, model, config.num_key_value_heads)
    about["head_size"] = texts[0]["keys"].shape[-1]
    used = {**dataclasses.asdict(settings), "data": data_name}
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = (
        _write_networks(out_dir, networks, about),
        _write_queries(out_dir, texts, rotary_frequencies(model), about),
        _write_shares(out_dir, {**about, "shares": shares, "settings": used}),
    )
    shutil.rmtree(store)
    return paths


def _write_networks(out_dir: Path, networks: dict[int, Network], about: _About) -> Path:
    """Write weights as half floats, and what scales inputs as it is."""
    tensors = {
        f"{layer}.{part}": tensor.half() if "." in part else tensor
        for layer, network in networks.items()
        for part, tensor in network.items()
    }
    path = out_dir / "kvzap.safetensors"
    save_whole(tensors, path, _metadata(SCORER_FORMAT, about))
    return path


def _write_queries(
    out_dir: Path, texts: list[dict[str, Tensor]], frequencies: Tensor, about: _About
) -> Path:
    """Write how queries are distributed over all texts, covariances as half floats."""
    mean, products = (
        torch.stack([one[name] for one in texts]).mean(0)
        for name in ("mean", "products")
    )
    covariance = products - mean[..., :, None] * mean[..., None, :]
    tensors = {FREQUENCIES: frequencies}
    for place, layer in enumerate(texts[0]["layers"].tolist()):
        tensors[f"{layer}.mean"] = mean[place]
        tensors[f"{layer}.covariance"] = covariance[place].half()
    path = out_dir / "queries.safetensors"
    save_whole(tensors, path, _metadata(QUERIES_FORMAT, about))
    return path


def rotary_frequencies(model: Any) -> Tensor:
    """How a model's rotation turns keys, radians a token, ``[r]``; empty: it does not.

    Those of all layers with a choice of their own: what others turn by is not asked.
    """
    found = (getattr(module, "inv_freq", None) for module in model.modules())
    frequencies = next((one for one in found if one is not None), torch.zeros(0))
    return frequencies.detach().float().cpu()


def _metadata(kind: str, about: _About) -> dict[str, str]:
    return {key: str(value) for key, value in {"format": kind, **about}.items()}


def _write_shares(out_dir: Path, profile: dict[str, Any]) -> Path:
    levels = [rounded(level) for level in profile["shares"]]
    path = out_dir / "history.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(
        to_lines({"format": HISTORY_FORMAT, **profile, "shares": levels})
    )
    unfinished.replace(path)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``kvserve profile scorer``."""
    parser.description = (
        "Have the model repeat text, and learn which tokens that takes: a network for\n"
        "each layer (KVzap, arXiv 2601.07891; KVzip, arXiv 2505.23416), and each\n"
        "head's part of a budget, which all policies that thin use."
    )
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write kvzap.safetensors, queries.safetensors and history.json "
        "(default: beside the profiles that ship, where policies find them by the "
        "model's name)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="text to hide facts in (default: a novel that ships)",
    )
    add_flags(parser, ScorerSettings, _HELP)


def run(args: argparse.Namespace) -> int:
    """Run ``kvserve profile scorer`` and say what was written."""
    settings = read_flags(args, ScorerSettings)
    model_dir, out_dir = files_of(args)
    try:
        paths = profile_scorer(model_dir, settings, out_dir, data=args.data)
    except KeyboardInterrupt:
        print("\nkvserve: stopped; the same command goes on")
        return 130
    for path in paths:
        print(f"wrote {path}")
    return 0
