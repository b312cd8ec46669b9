# SPDX-License-Identifier: Apache-2.0
"""Nothing is compiled unless somebody asks, and then what that needs is there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from torch._inductor import config as inductor
from vllm.compilation import decorators
from vllm.v1.sample.ops.logprobs import batched_count_greater_than

from kvserve.engine.worker.compiled_code import (
    allow_compilation,
    let_compiled_code_load,
)


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


@pytest.fixture(name="no_compiler")
def _no_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    allow_compilation(True)
    torch.compiler.reset()


@pytest.mark.usefixtures("no_compiler")
def test_ranks_of_log_probabilities_need_no_compiler() -> None:
    rows, chosen = torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0.2]])
    allow_compilation(False)
    assert batched_count_greater_than(rows, chosen).tolist() == [2]
    allow_compilation(True)
    with pytest.raises(Exception, match="compiler"):
        batched_count_greater_than(rows, chosen)
