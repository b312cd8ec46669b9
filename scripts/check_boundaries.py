# SPDX-License-Identifier: Apache-2.0
"""Keep imports where the layout wants them: one line a violation, exit code 1."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_MAY_IMPORT_VLLM = ("kvserve/engine/", "kvserve/http/", "kvserve/plugin.py")
_KERNELS = "kvserve/kernels/"
_KERNEL_IMPORTS = {"torch", "triton", "kvserve", "__future__", *sys.stdlib_module_names}
_DEVICE_ADAPTER = ("kvserve/engine/device.py", _KERNELS)


def imported_modules(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def violations(path: str, source: str) -> list[str]:
    """Say what is imported or called where it may not be."""
    modules = imported_modules(ast.parse(source))
    found = []
    if "vllm" in modules and not path.startswith(_MAY_IMPORT_VLLM):
        found.append("imports vllm; only kvserve/engine and kvserve/http may")
    if path.startswith(_KERNELS) and modules - _KERNEL_IMPORTS:
        found.append("kernels import torch and triton alone")
    if "torch.cuda" in source and not path.startswith(_DEVICE_ADAPTER):
        found.append("uses torch.cuda outside the device adapter")
    return found


def main() -> int:
    """Check both packages."""
    failed = False
    for package in ("kvserve", "policies"):
        for file in sorted((_ROOT / package).rglob("*.py")):
            path = file.relative_to(_ROOT).as_posix()
            for violation in violations(path, file.read_text()):
                print(f"{path}: {violation}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
