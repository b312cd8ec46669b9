# SPDX-License-Identifier: Apache-2.0
"""Triton's compiler for a GPU that is not there: kernels are compiled, not launched."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """A kernel as a GPU would load it.

    Attributes:
        shared_bytes: of a multiprocessor's fast memory, a program.
        spilled_bytes: what registers were too few for and goes to memory and back, a
            thread.
        ptx: its code, before the assembler.
    """

    name: str
    shared_bytes: int
    spilled_bytes: int
    ptx: str


class _Driver:
    """Answers what the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are kept for each device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(
    capability: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Compiled]]:
    """Compile what is launched inside, from the arguments that it is launched with.

    Args:
        capability: of the GPU, 90 for an H100.
        folder: where the compiler may write.

    Yields:
        What was compiled; it grows with every launch.
    """
    compiled: list[Compiled] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        kernel = launch(self, *args, **{**options, "warmup": True})
        compiled.append(
            Compiled(
                self.fn.__name__,
                kernel.metadata.shared,
                _spilled_bytes(kernel.asm["cubin"], folder),
                kernel.asm["ptx"],
            )
        )
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(knobs.cache, "dir", str(folder))
        patch.setattr(driver, "_active", _Driver(capability))
        yield compiled


def _spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Count what a thread of a kernel keeps in local memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)
