# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of compiled code that it loads is there."""

from __future__ import annotations

import inspect

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from vllm.compilation import decorators

from kvserve.engine.worker.compiled_code import let_compiled_code_load


class Code:
    """Stands in for what a file of compiled code holds."""

    def serialize(self) -> bytes:
        return b""


def test_loaded_code_takes_the_call_that_vllm_ends_loading_with() -> None:
    asked = inspect.getsource(decorators._try_load_aot_compiled_fn)
    assert "compiled_fn.finalize_loading(model.vllm_config)" in asked
    for _ in range(2):
        let_compiled_code_load()
    loaded = BundledAOTAutogradSerializableCallable(Code())
    assert loaded.finalize_loading(None) is None
