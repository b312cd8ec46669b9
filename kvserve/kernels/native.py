# SPDX-License-Identifier: Apache-2.0
"""The statistics of a CPU, in C++: compiled at first need, for the CPU that runs it.

Calls are those of ``statistics``, which stands in where there is no compiler. The
object is kept in the cache directory, under a name that says what it was made of.
Processes that start together may each compile it: what they make is the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from kvserve.kernels import statistics
from kvserve.kernels.statistics import CachedRows
from kvserve.models import cache_dir

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / "attention_mass.cpp", _FOLDER / "decode_mass.cpp"]
_HEADER = _FOLDER / "vectors.h"
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared")
_CPU_FEATURES = ("flags", "Features")
"""What Linux calls the line, on x86 and on Arm."""


def attention_mass(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """As ``statistics.attention_mass``; products of bfloat16 are exact here too."""
    if library() is None:
        return statistics.attention_mass(query, key, scale)
    kv_heads, keys, width = key.shape
    assert width % 2 == 0
    if not query.dtype == key.dtype == torch.bfloat16:
        query, key = query.float(), key.float()
    query, key = query.contiguous(), key.contiguous()
    mass = torch.empty(kv_heads, keys)
    sizes = kv_heads, len(query) // kv_heads, query.shape[1], keys, width
    _call(f"attention_mass_{_name(key)}", query, key, mass, *sizes, scale)
    return mass


def add_row_attention(
    query: Tensor,
    pool: Tensor,
    places: Tensor | None,
    cached: CachedRows,
    scale: float,
    mass: Tensor,
) -> None:
    """As ``statistics.add_row_attention``, on the pages themselves.

    Args:
        query: ``[R, G, d]``, of the pool's type, which is bfloat16 or float32.
        pool: ``[num_pages, 2, page_size * d]``, keys first.
        places: Where the keys of a page have number ``d`` of token ``t``,
            ``[d, page_size]`` int32; ``None`` where they are ``[d, page_size]``.
    """
    group, width = query.shape[1:]
    name = f"add_row_attention_{_name(pool)}"
    rows = _rows(cached)
    _call(name, *rows, pool, places, width, query.contiguous(), group, scale, mass)


def lightest_slots(
    cached: CachedRows,
    mass: Tensor,
    position: Tensor,
    own: Tensor,
    safe_from: Tensor,
    by_count: bool,
) -> Tensor:
    """As ``statistics.lightest_slots``."""
    token_state = mass, position, own, safe_from
    if library() is None:
        return statistics.lightest_slots(cached, *token_state, by_count)
    slots = torch.empty_like(cached.rows)
    _call("lightest_slots", *_rows(cached), *token_state, int(by_count), slots)
    return slots


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels; ``None``, and one line that says so, without."""
    compiler = os.environ.get("CXX", "c++")
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            "kvserve: policies that sum attention read prompts a third slower, for "
            f"{compiler} did not compile {_SOURCES[0].name}: install g++, or name a "
            f"C++ compiler in CXX ({_reason(error)})",
            file=sys.stderr,
        )
        return None


def _compiled(compiler: str) -> Path:
    content = [path.read_text() for path in (*_SOURCES, _HEADER)]
    made_of = repr([*content, compiler, *_FLAGS, _cpu()])
    name = f"statistics-{sha256(made_of.encode()).hexdigest()[:16]}.so"
    target = cache_dir() / "kernels" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as folder:
        made = Path(folder) / name
        command = [*compiler.split(), *_FLAGS, "-o", str(made), *map(str, _SOURCES)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(target)
    return target


def _cpu() -> str:
    """Name what the CPU can do: unlike machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(_CPU_FEATURES)]
    return features[0] if features else f"{platform.machine()} {platform.processor()}"


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """One line of what went wrong."""
    if isinstance(error, OSError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {error.returncode}"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rows(cached: CachedRows) -> tuple[Tensor | int, ...]:
    """Spread out what C++ calls ``Rows``."""
    table = cached.page_table
    assert table.dtype == torch.int32
    assert table.stride(1) == 1
    rows = cached.rows
    return table, table.stride(0), cached.lengths, rows, len(rows), cached.page_size


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    getattr(library(), name)(*map(_as_c, arguments))


def _as_c(
    argument: Tensor | int | float | None,
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
