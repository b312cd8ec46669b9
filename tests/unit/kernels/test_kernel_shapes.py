# SPDX-License-Identifier: Apache-2.0
"""Kernels refuse what would make them touch memory beside their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvserve.engine.batch.head_major import HeadMajor
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.kernels import native

D, PAGE, ROWS, GROUP = 64, 32, 3, 2

pytestmark = pytest.mark.skipif(
    not native.can_attend(torch.float32, D, PAGE), reason="needs a C++ compiler"
)


def writing(**changed: Any) -> dict[str, Any]:
    return {
        "key": torch.zeros(ROWS, D),
        "value": torch.zeros(ROWS, D),
        "pool": torch.zeros(4, 1, PAGE, 2 * D),
        "slots": torch.arange(ROWS) + PAGE,
        **changed,
    }


def decoding(**changed: Any) -> dict[str, Any]:
    return {
        "query": torch.zeros(ROWS, GROUP, D),
        "pool": torch.zeros(4, 1, PAGE, 2 * D),
        "lengths": torch.ones(ROWS, dtype=torch.int32),
        "page_table": torch.ones(ROWS, 1, dtype=torch.int32),
        "scale": 1.0,
        "out": torch.zeros(ROWS, GROUP, D),
        **changed,
    }


def prefilling(**changed: Any) -> dict[str, Any]:
    return {
        "query": torch.zeros(4, ROWS, GROUP, D),
        "pool": torch.zeros(4, 1, PAGE, 2 * D),
        "first": torch.arange(ROWS),
        "counts": torch.full((ROWS,), 4, dtype=torch.int32),
        "lengths": torch.full((ROWS,), 4, dtype=torch.int32),
        "page_table": torch.ones(ROWS, 1, dtype=torch.int32),
        "scale": 1.0,
        "out": torch.zeros(4, ROWS, GROUP, D),
        **changed,
    }


@pytest.mark.parametrize("device", [True, False], ids=["vLLM's", "ours"])
@pytest.mark.parametrize(
    "changed",
    [
        {"slots": torch.arange(ROWS - 1)},  # heads that nobody counted
        {"slots": torch.arange(ROWS, dtype=torch.int32)},
        {"value": torch.zeros(ROWS - 1, D)},
        {"value": torch.zeros(ROWS, D // 2)},
        {"pool": torch.zeros(4, 1, PAGE, D)},
        {"pool": torch.zeros(4, 2, PAGE, 2 * D)},
        {"pool": torch.zeros(4, 1, 2 * PAGE, 2 * D)[:, :, ::2]},
    ],
    ids=str,
)
def test_pages_are_written_for_as_many_tokens_as_there_are_slots(
    changed: dict[str, Any], device: bool
) -> None:
    cpu = CPUDevice(torch.float32, GROUP, D, PAGE)
    write = cpu.write if device else native.write_pages
    write(**writing())
    with pytest.raises(ValueError, match="kernels take"):
        write(**writing(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"query": torch.zeros(ROWS, 2 * GROUP, D)[:, ::2]},
        {"query": torch.zeros(ROWS - 1, GROUP, D)},
        {"out": torch.zeros(ROWS, GROUP, D).bfloat16()},
        {"lengths": torch.ones(ROWS - 1, dtype=torch.int32)},
        {"lengths": torch.ones(ROWS)},
        {"page_table": torch.ones(ROWS - 1, 1, dtype=torch.int32)},
        {"page_table": torch.ones(ROWS, 1)},
        {"pool": torch.zeros(4, 1, PAGE, D)},
    ],
    ids=str,
)
def test_decode_takes_rows_that_fit(changed: dict[str, Any]) -> None:
    native.decode_attention(**decoding())
    with pytest.raises(ValueError, match="kernels take"):
        native.decode_attention(**decoding(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"query": torch.zeros(4, ROWS, 2 * GROUP, D)[:, :, ::2]},
        {"query": torch.zeros(3, ROWS, GROUP, D)},
        {"first": torch.arange(ROWS - 1)},
        {"counts": torch.ones(ROWS)},
        {"lengths": torch.ones(ROWS + 1, dtype=torch.int32)},
        {"pool": torch.zeros(4, 1, PAGE, 2 * D + 8, dtype=torch.float32)},
    ],
    ids=str,
)
def test_prefill_takes_rows_that_fit(changed: dict[str, Any]) -> None:
    native.prefill_attention(**prefilling())
    with pytest.raises(ValueError, match="kernels take"):
        native.prefill_attention(**prefilling(**changed))


def test_queries_of_one_kv_head_are_laid_out_for_kernels() -> None:
    """They are a view of what a projection made of queries, keys and values."""
    fused = torch.randn(5, (GROUP + 2) * D)
    query = fused[:, : GROUP * D].view(5, GROUP, D)
    assert not query.is_contiguous()
    rows = HeadMajor(decodes=5, group=GROUP).rows_of(query)
    assert rows.is_contiguous()
    assert torch.equal(rows, query)
