# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's compiler needs of a machine with a CPU."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from kvserve.errors import UserError


def check_compiler() -> None:
    """Refuse to start what is to be compiled where nothing can be.

    Raises:
        UserError: names what is not there.
    """
    header = Path(sysconfig.get_path("include"), "Python.h")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        lacking = "no C++ compiler: install g++, or name one in CXX"
    else:
        if header.exists():
            return
        lacking = f"no {header}: install Python's headers (python3-dev)"
    raise UserError(
        f"PyTorch is to compile the model, and there is {lacking}; or start with "
        "--enforce-eager, which compiles nothing"
    )
