# SPDX-License-Identifier: Apache-2.0
"""What profilers share: loading a model, remembering work, writing files."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvserve.errors import UserError
from kvserve.models import add_model, cache_dir, resolve_model
from kvserve.texts.families import PROFILING
from kvserve.texts.haystack import load_book, load_text

Item = TypeVar("Item")


def load_model(model_dir: str, needed: dict[str, int]) -> tuple[Any, Any]:
    """Load a model in float32, and its tokenizer, on the best device there is.

    Args:
        needed: What each flag asks the model to read at once, in tokens.

    Raises:
        UserError: the model cannot be loaded, or cannot read that much.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"MODEL {model_dir}: cannot be loaded ({reason})") from None
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for flag, tokens in needed.items():
        if limit and tokens > limit:
            raise UserError(
                f"{flag}: {Path(model_dir).name} reads at most {limit} tokens, its "
                f"answer included, and this asks for {tokens}"
            )
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def files_of(args: argparse.Namespace) -> tuple[str, Path]:
    """Return the model and the folder that flags of ``add_files`` ask for."""
    model_dir = resolve_model(args.model)
    return model_dir, args.out or profile_folder(model_dir)


def prose(data: Path | None) -> tuple[str, str]:
    """Return the text to hide things in, and what a profile calls it.

    Args:
        data: its file; ``None`` is the book that ships.

    Raises:
        UserError: the file cannot be read.
    """
    if data is None:
        return load_book(PROFILING.book), PROFILING.book
    return load_text(data), data.name


def about_model(model_dir: str, model: Any, num_kv_heads: int) -> dict[str, Any]:
    """A profile's entries that say of which model it is."""
    config = model.config.get_text_config()
    return {
        "model": Path(model_dir).name,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_kv_heads": num_kv_heads,
    }


def profile_folder(model_dir: str) -> Path:
    """Where policies look for the profiles of a model: beside those that ship."""
    return Path(str(files("policies"))) / "profiles" / Path(model_dir).name


def store_path(model_dir: str, settings: tuple[object, ...], text: str) -> Path:
    """Name the file of finished work after all that it depends on."""
    weights = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(model_dir).glob("*.safetensors"))
    ]
    what = (str(Path(model_dir).resolve()), weights, settings, text)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    folder = cache_dir() / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{Path(model_dir).name}-{digest}.jsonl"


def finished(store: Path, read: Callable[[str], tuple[str, Item]]) -> dict[str, Item]:
    """Return what a store holds, by key; ``read`` makes a key and an item of a line."""
    done: dict[str, Item] = {}
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            key, item = read(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            # The run was killed while it wrote this line: measure it again.
            continue
        done[key] = item
    return done


@contextmanager
def appending(store: Path) -> Iterator[Callable[[str], None]]:
    """Open a store; what is yielded writes a line of finished work."""
    with store.open("a") as file:
        # A run that was killed may have left half a line: do not write behind it.
        file.write("\n" if file.tell() else "")

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        yield write


def add_files(parser: argparse.ArgumentParser, kind: str, hidden: str) -> None:
    """Declare what to measure, with what text, and where to write the profile.

    Args:
        kind: Name of the profile's file.
        hidden: What is hidden in the text.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help=f"where to write {kind}.json and .png (default: beside the profiles that "
        f"ship, where the {kind} policy finds them by the model's name)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help=f"text to hide {hidden} in (default: a novel that ships)",
    )


def add_flags(
    parser: argparse.ArgumentParser, settings: type[Any], helps: dict[str, str]
) -> None:
    """Declare a flag for each field of a settings dataclass."""
    for field in dataclasses.fields(settings):
        default: Any = field.default
        many = isinstance(default, tuple)
        value = default[0] if many else default
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar="N" if isinstance(value, int) else "X",
            type=type(value),
            nargs="+" if many else None,
            default=default,
            help=f"{helps[field.name]} (default: {_shown(default)})",
        )


def read_flags(args: argparse.Namespace, settings: type[Item]) -> Item:
    """Make the settings dataclass whose flags ``add_flags`` declared."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return settings(**values)


def at_least_one(settings: Any, *names: str) -> None:
    """Refuse numbers below 1 in those fields of a settings dataclass.

    Raises:
        UserError: names the flag of the first.
    """
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: must be at least 1")


def _shown(default: Any) -> str:
    values = default if isinstance(default, tuple) else (default,)
    return " ".join(map(str, values))


def rounded(scores: Tensor, digits: int = 4) -> list[list[float]]:
    """Round ``[rows, columns]`` for a file that people read."""
    return [[round(value, digits) for value in row] for row in scores.tolist()]


def to_lines(profile: dict[str, Any]) -> str:
    """Write a profile as JSON with one line for each entry of a list."""
    lines = []
    for key, value in profile.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
