# SPDX-License-Identifier: Apache-2.0
"""What PyTorch compiles on CPUs: nothing, unless somebody asks.

Where somebody does, vLLM 0.32 keeps what it compiles, and after loading it calls
``finalize_loading`` of the code
(``vllm.compilation.decorators._try_load_aot_compiled_fn``). Its own code has that
method. What Inductor compiles as a whole, which is what runs on a CPU, is of a class of
PyTorch's that has not, so vLLM takes the load for failed and compiles again, for a
minute and more, at every start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo import aot_compile_types


def _nothing_left_to_load(self: Any, vllm_config: Any) -> None:
    """PyTorch loads the whole at once."""


def let_compiled_code_load() -> None:
    """Let vLLM use what an earlier start compiled; may be called more than once."""
    code = aot_compile_types.BundledAOTAutogradSerializableCallable
    if "finalize_loading" not in vars(code):
        code.finalize_loading = _nothing_left_to_load  # type: ignore[attr-defined]


def allow_compilation(allowed: bool) -> None:
    """Settle whether this process compiles what is marked with ``torch.compile``.

    vLLM marks more than models, and has that compiled, whatever a user chose, by the
    first request that needs it. Log probabilities are such a thing: nobody gets a token
    for half a minute, and where no compiler is the request ends the engine.
    """
    torch.compiler.set_stance("default" if allowed else "force_eager")
