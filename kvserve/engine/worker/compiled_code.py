# SPDX-License-Identifier: Apache-2.0
"""Compiled code of an earlier start, on CPUs.

vLLM 0.32 keeps what it compiles, and after loading it calls ``finalize_loading`` of
the code (``vllm.compilation.decorators._try_load_aot_compiled_fn``). Its own code has
that method. What Inductor compiles as a whole, which is what runs on a CPU, is of a
class of PyTorch's that has not, so vLLM takes the load for failed and compiles again,
for a minute and more, at every start.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo import aot_compile_types


def _nothing_left_to_load(self: Any, vllm_config: Any) -> None:
    """PyTorch loads the whole at once."""


def let_compiled_code_load() -> None:
    """Let vLLM use what an earlier start compiled; may be called more than once."""
    code = aot_compile_types.BundledAOTAutogradSerializableCallable
    if "finalize_loading" not in vars(code):
        code.finalize_loading = _nothing_left_to_load  # type: ignore[attr-defined]
