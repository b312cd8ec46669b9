# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels of a CPU at first need, for the CPU that runs them.

The object is kept in the cache directory, under a name that says what it was made of.
Processes that start together may each compile it: what they make is the same.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from kvserve.models import cache_dir

FOLDER = Path(__file__).parent
_SOURCES = [
    FOLDER / "decode_attention.cpp",
    FOLDER / "prefill_attention.cpp",
    FOLDER / "attention_mass.cpp",
    FOLDER / "decode_mass.cpp",
    FOLDER / "norms.cpp",
    FOLDER / "write_pages.cpp",
]
_HEADERS = [
    FOLDER / name
    for name in (
        "vectors.h",
        "pages.h",
        "numbers.h",
        "products.h",
        "scores.h",
        "gaps.h",
    )
]
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC")
_CPU_FEATURES = ("flags", "Features")
"""What Linux calls the line, on x86 and on Arm."""


def compiled(compiler: str) -> Path:
    """Return the compiled object, made now unless it was.

    Raises:
        OSError: there is no such compiler.
        CalledProcessError: it did not compile.
    """
    content = [path.read_text() for path in (*_SOURCES, *_HEADERS)]
    made_of = repr([*content, compiler, *_FLAGS, _cpu()])
    name = f"kernels-{sha256(made_of.encode()).hexdigest()[:16]}.so"
    target = cache_dir() / "kernels" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as folder:
        made = Path(folder) / name
        _compile(compiler, made)
        made.replace(target)
    return target


def _compile(compiler: str, target: Path) -> None:
    """Compile each source for itself, all at once, and link them."""
    compile_one = [*compiler.split(), *_FLAGS]
    objects = [target.with_name(f"{source.stem}.o") for source in _SOURCES]
    commands = [
        [*compile_one, "-c", "-o", str(made), str(source)]
        for source, made in zip(_SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    _run([*compile_one, "-shared", "-o", str(target), *map(str, objects)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _cpu() -> str:
    """Name what the CPU can do: unlike machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(_CPU_FEATURES)]
    return features[0] if features else f"{platform.machine()} {platform.processor()}"


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """One line of what went wrong."""
    if isinstance(error, OSError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {error.returncode}"
