# SPDX-License-Identifier: Apache-2.0
"""What this machine's processor is good at."""

from __future__ import annotations

import platform
import sys

import torch

_X86 = ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Tell whether bfloat16 matrices are multiplied as fast as float32 ones.

    PyTorch has kernels for it from AVX-512 on; below, on x86, it takes ten times as
    long as in float32. A build for GPUs leaves them to the GPU.
    """
    if torch.version.cuda is not None or platform.machine() not in _X86:
        return True
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def default_dtype() -> str:
    """Name the type in which this processor runs a 16-bit model fastest."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def settle_dtype(asked: str | None) -> str:
    """Return the type to serve a model in: what was asked for, or what is fast.

    Args:
        asked: ``None`` or ``auto`` where nobody said.
    """
    if asked not in (None, "auto") or multiplies_bfloat16():
        return asked or "auto"
    print(
        "kvserve: this processor has no AVX-512 and multiplies bfloat16 at a tenth of "
        "the speed of float32: serving in float32 (--dtype bfloat16 insists)",
        file=sys.stderr,
    )
    return "float32"
