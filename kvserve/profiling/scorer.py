# SPDX-License-Identifier: Apache-2.0
"""Learn which tokens a model will need, and how many of them each head.

Texts with made-up facts in them are read and repeated (``repetition.py``); what the
repetition looked at tells what to keep. A network for each layer learns to foretell it
from keys and values alone (``score_training.py``), and the share of each head's tokens
that lie above thresholds for the whole model becomes its part of a budget
(``policies/history.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.models import add_model
from kvserve.profiling.repetition import (
    Reading,
    RepetitionProbe,
    build_repetition,
    read_and_repeat,
)
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
from kvserve.profiling.score_training import train_network
from kvserve.texts.families import PROFILING
from policies.expected_attention import FREQUENCIES, QUERIES_FORMAT
from policies.history import HISTORY_FORMAT
from policies.kvzap import SCORER_FORMAT, Network, inputs_of
from policies.thinning import Groups

_SINKS, _GROUP = 32, 128
_PERCENT = "0.5 1 2 3 4 5 6 8 10 12.5 15 20 25 30 40 50 60 70 80 90"
LEVELS = tuple(float(percent) / 100 for percent in _PERCENT.split())
"""Shares of all tokens of all heads that lie above the thresholds of a ladder."""
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

    The defaults take the embedded model on two idle CPU cores about ten minutes.

    Attributes:
        texts: Texts to read and repeat.
        tokens: Tokens of each, its prompt included; with the repetition nearly twice.
        facts: Made-up facts in each.
        width: Hidden units of each layer's network.
        epochs: How often each text is learned from.
        seed: Draws texts and facts, and what networks start with.
    """

    texts: int = 32
    tokens: int = 1536
    facts: int = 8
    width: int = 256
    epochs: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "texts", "tokens", "facts", "width", "epochs")


_HELP = {
    "texts": "texts to read and repeat",
    "tokens": "tokens of each; the model reads nearly twice as many at once",
    "facts": "made-up facts hidden in each",
    "width": "hidden units of each layer's network",
    "epochs": "how often each text is learned from",
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
    _read(model, tokenizer, settings, text, store, progress)
    texts = [load_file(path) for path in sorted(store.glob("text-*.safetensors"))]
    config = model.config.get_text_config()
    about = about_model(model_dir, model, config.num_key_value_heads)
    about["head_size"] = texts[0]["keys"].shape[-1]
    networks = _train(texts, settings, store, progress)
    shares = head_shares(torch.cat([one["scores"] for one in texts], 1).float())
    layers = texts[0]["layers"].tolist()
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = _write_networks(out_dir, dict(zip(layers, networks, strict=True)), about)
    queries = _write_queries(out_dir, texts, rotary_frequencies(model), about)
    used = {**dataclasses.asdict(settings), "data": data_name}
    rows = torch.zeros(len(LEVELS), about["num_layers"], shares.shape[-1])
    rows[:, layers] = shares
    history = _write_shares(out_dir, {**about, "shares": rows, "settings": used})
    shutil.rmtree(store)
    return weights, queries, history


def _read(
    model: Any,
    tokenizer: Any,
    settings: ScorerSettings,
    text: str,
    store: Path,
    progress: bool,
) -> None:
    """Read and repeat the texts that the store does not hold yet."""
    probe = RepetitionProbe()
    probe.attach(model)
    bar = tqdm(range(settings.texts), "reading", unit="text", disable=not progress)
    for item in bar:
        path = store / f"text-{item:04}.safetensors"
        if path.exists():
            continue
        seed = f"scorer/{settings.seed}/{item}"
        repetition = build_repetition(
            tokenizer, PROFILING, settings.tokens, settings.facts, seed, text
        )
        readings = read_and_repeat(model, probe, repetition)
        layers = torch.tensor(sorted(probe.readings))
        found = in_groups(readings, repetition.text[1]) | moments(readings)
        save_whole({**found, "layers": layers}, path)


def in_groups(readings: Sequence[Reading], end: int) -> dict[str, Tensor]:
    """Lay together what all layers saw of whole groups before ``end``, in half floats.

    Returns:
        Keys and values, ``[R, n, H_kv, G, d]``, and scores, ``[R, n, H_kv, G]``.
    """
    count = (end - _SINKS) // _GROUP
    rows = slice(_SINKS, _SINKS + count * _GROUP)

    def cut(parts: list[Tensor]) -> Tensor:
        together = torch.stack([part[:, rows].half().cpu() for part in parts])
        shape = *together.shape[:2], count, _GROUP, *together.shape[3:]
        return together.view(shape).transpose(1, 2).contiguous()

    return {
        "keys": cut([one.keys for one in readings]),
        "values": cut([one.values for one in readings]),
        "scores": cut([one.scores for one in readings]),
    }


def moments(readings: Sequence[Reading]) -> dict[str, Tensor]:
    """Means of queries and of their products, ``[R, H_q, d]``, ``[R, H_q, d, d]``."""
    queries = torch.stack([one.queries for one in readings])
    products = queries.transpose(2, 3) @ queries / queries.shape[2]
    return {"mean": queries.mean(2).cpu(), "products": products.cpu()}


def head_shares(scores: Tensor) -> Tensor:
    """Share of each head's tokens above each threshold, ``[levels, R, H_kv]``.

    Args:
        scores: Of all texts, ``[R, n, H_kv, G]``.
    """
    ranked = scores.flatten().sort().values
    thresholds = [ranked[int((1 - level) * (len(ranked) - 1))] for level in LEVELS]
    return torch.stack([(scores > one).float().mean((1, 3)) for one in thresholds])


def _train(
    texts: list[dict[str, Tensor]],
    settings: ScorerSettings,
    store: Path,
    progress: bool,
) -> list[Network]:
    """Train the networks that the store does not hold yet; return all."""
    networks = []
    count = len(texts[0]["layers"])
    for layer in tqdm(range(count), "learning", unit="layer", disable=not progress):
        path = store / f"layer-{layer:03}.safetensors"
        if not path.exists():
            keys, values, scores = (
                torch.cat([one[name][layer] for one in texts]).float()
                for name in ("keys", "values", "scores")
            )
            inputs = inputs_of(Groups(keys, values, torch.empty(0)))
            network = train_network(
                inputs, scores, settings.width, settings.epochs, settings.seed
            )
            save_whole(network, path)
        networks.append(load_file(path))
    return networks


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


def save_whole(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file that whoever finds it finds all of."""
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(save(tensors, metadata))
    unfinished.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``kvserve profile scorer``."""
    parser.description = (
        "Have the model repeat text, and learn which tokens that takes: a network for\n"
        "each layer (KVzap, arXiv 2601.07891), and each head's part of a budget\n"
        "(KVzip, arXiv 2505.23416). All policies that thin use the second."
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
