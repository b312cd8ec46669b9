# SPDX-License-Identifier: Apache-2.0
"""Import everything that a run imports, and say at once all that is missing.

A module that is missing is replaced by an empty one, so that the next can be asked for.
Prints one line of JSON; the exit code says whether nothing is missing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.gpu import stages, stub_card

MODULES = (
    "vllm",
    "vllm.platforms.cuda",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.sample.sampler",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.vllm_flash_attn.flash_attn_interface",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.model_executor.layers.fused_moe.fused_moe",
    "vllm.model_executor.model_loader.dummy_loader",
    "kvserve.engine.worker.worker",
    "kvserve.engine.start.llm",
    "kvserve.evaluation.engine",
    "kvserve.engine.worker.selection",
    "kvserve.engine.devices.gpu_staging",
    "kvserve.engine.devices.gpu",
    "kvserve.plugin",
    "kvserve.models",
    "gguf",
    "benchmarks.attention",
    "benchmarks.gpu_rows",
    "benchmarks.needles",
    "benchmarks.serving",
    "tests.engine.harness",
    "tests.engine.test_identity",
    "tests.engine.test_oracle",
    "tests.engine.test_dense_policies",
    "tests.engine.test_no_leak",
    "tests.engine.test_triton_engine",
)
OPERATIONS = {
    "_C": ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding"),
    "_C_cache_ops": ("reshape_and_cache_flash",),
    "_vllm_fa3_C": ("fwd", "get_scheduler_metadata"),
    "_moe_C": ("topk_softmax", "moe_align_block_size"),
}
"""Operations that must exist, by the library that registers them."""


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, last of all, modules that have been found to be missing."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def anything(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]


def import_all(modules: Sequence[str], missing: Missing) -> list[str]:
    """Import modules; return what failed for another reason than a missing one."""
    failed = []
    for name in modules:
        while True:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                top = (error.name or "").split(".")[0]
                if top and top not in missing.names and top not in sys.modules:
                    missing.names.add(top)
                    continue
                failed.append(f"{name}: {error}")
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            break
    return failed


def missing_operations() -> list[str]:
    """Operations that no extension has registered."""
    import torch

    found = []
    for library, names in OPERATIONS.items():
        registered = getattr(torch.ops, library)
        found += [f"{library}.{n}" for n in names if not hasattr(registered, n)]
    return found


def main() -> int:
    """Import, and say what is missing."""
    stub_card.install()
    missing = Missing()
    sys.meta_path.append(missing)
    own = [
        f"scripts.gpu.stages.{one.name}"
        for one in pkgutil.iter_modules(stages.__path__)
    ]
    failed = import_all(MODULES[:2], missing)
    if not failed:
        stub_card.choose_platform()
        failed += import_all([*MODULES[2:], *own], missing)
        failed += import_all(["vllm._moe_C_stable_libtorch"], missing)
    found = {
        "modules": len(MODULES) + len(own),
        "missing": sorted(missing.names),
        "failed": failed,
        "operations": missing_operations(),
    }
    print(json.dumps(found))
    return 1 if any(found[key] for key in ("missing", "failed", "operations")) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
