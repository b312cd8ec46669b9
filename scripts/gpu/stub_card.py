# SPDX-License-Identifier: Apache-2.0
"""A stand-in for an H100 and its driver, with which everything imports without one.

``build_driver`` makes a ``libcuda.so.1`` with the symbols that extensions want, each of
which fails; ``install`` lets ``torch.cuda`` answer as the card would.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DRIVER = "libcuda.so.1"
NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30
_FAILED = 999  # CUDA_ERROR_UNKNOWN


def undefined_symbols(libraries: list[Path]) -> list[str]:
    """Symbols of the driver that libraries leave to it."""
    found: set[str] = set()
    for library in libraries:
        command = ["nm", "-D", "--undefined-only", str(library)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True)
        for line in lines.stdout.splitlines():
            name = line.split()[-1].split("@")[0]
            if name.startswith("cu") and name[2:3].isupper():
                found.add(name)
    return sorted(found)


def build_driver(libraries: list[Path], folder: Path) -> Path:
    """Compile the stand-in below ``folder``; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "driver.c"
    names = undefined_symbols(libraries)
    functions = (f"int {name}(void) {{ return {_FAILED}; }}\n" for name in names)
    source.write_text("".join(functions))
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o"]
    subprocess.run([*command, str(folder / DRIVER), str(source)], check=True)
    return folder / DRIVER


def install() -> None:
    """Pretend, in this process, that the card is there."""
    import torch

    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        total_memory=MEMORY,
        warp_size=32,
        L2_cache_size=50 << 20,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
        max_threads_per_multi_processor=2048,
        uuid="0",
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda _=None: CAPABILITY,
        "get_device_name": lambda _=None: NAME,
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (MEMORY, MEMORY),
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def choose_platform() -> None:
    """Let vLLM take its CUDA platform, which it would look for by NVML."""
    import vllm.platforms as platforms
    from vllm.platforms import cuda

    platforms._current_platform = cuda.CudaPlatform()
