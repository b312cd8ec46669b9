# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve rows with gaps on CPUs, where others would serve without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.engine.devices.cpu_converting import ConvertingCPUDevice
from kvserve.engine.devices.hardware import cpu_kernels
from kvserve.errors import UserError
from kvserve.kernels import native
from kvserve.kernels.page_formats import INT8

GROUP, WIDTH, PAGE = 3, 64, 32
needs_compiler = pytest.mark.skipif(
    not native.can_attend(torch.float32, WIDTH, PAGE), reason="needs a C++ compiler"
)


@pytest.fixture
def foreign_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM lay pages out as our kernels do not read them, as with AMX."""
    monkeypatch.setattr(CPUDevice, "_can_attend", lambda _: False)


@needs_compiler
@pytest.mark.usefixtures("foreign_layout")
def test_our_kernels_lay_pages_out_where_gaps_need_them() -> None:
    shape = torch.bfloat16, GROUP, WIDTH, PAGE
    assert not cpu_kernels(None, *shape).supports_gaps
    kernels = cpu_kernels(None, *shape, gaps=True)
    assert isinstance(kernels, ConvertingCPUDevice)
    assert kernels.supports_gaps


@needs_compiler
def test_pages_stay_vllms_where_our_kernels_read_them() -> None:
    for gaps in (False, True):
        kernels = cpu_kernels(None, torch.float32, GROUP, WIDTH, PAGE, gaps)
        assert type(kernels) is CPUDevice
        kernels = cpu_kernels(INT8, torch.float32, GROUP, WIDTH, PAGE, gaps)
        assert isinstance(kernels, ConvertingCPUDevice)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_our_kernels_lay_out_they_read(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages, and attention over them, are those of a CPU whose layout they share."""
    torch.manual_seed(0)
    known = CPUDevice(dtype, GROUP, WIDTH, PAGE)
    assert known.supports_gaps
    monkeypatch.setattr(CPUDevice, "_can_attend", lambda _: False)
    own = cpu_kernels(None, dtype, GROUP, WIDTH, PAGE, gaps=True)
    key, value = torch.randn(2, 70, WIDTH).to(dtype)
    query = torch.randn(5, GROUP, WIDTH).to(dtype)
    table = torch.tensor([[3, 1, 2]] * 2, dtype=torch.int32)
    slots = (table[0].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:70]
    # A decode, and a chunk of four.
    shapes = RowShapes(
        1,
        np.array([0, 1, 5], dtype=np.int32),
        np.array([60, 70], dtype=np.int32),
        np.arange(2),
        np.array([[33, 40], [50, 64]], dtype=np.int32),
    )
    found = []
    for device in (known, own):
        pool, out = torch.zeros(4, 1, PAGE, 2 * WIDTH, dtype=dtype), query.clone()
        device.write(key, value, pool, slots)
        device.attend(query, pool, device.plan_rows(shapes), table, 0.125, out)
        pages = table[0].long()
        read = device.read_keys(pool, pages), device.read_values(pool, pages)
        found.append((pool, out, *(each.to(dtype) for each in read)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][2].flatten(0, 1)[:70], key)


@pytest.mark.parametrize("page_format", [None, INT8], ids=["own type", "int8"])
@pytest.mark.parametrize(
    ("dtype", "head_size", "way_out"),
    [
        (torch.float16, WIDTH, "--dtype bfloat16"),
        (torch.bfloat16, 80, "multiple of 32 numbers, not 80"),
        (torch.bfloat16, WIDTH, "install g"),
    ],
    ids=str,
)
def test_gaps_that_no_kernel_takes_are_refused_in_one_line(
    page_format: None,
    dtype: torch.dtype,
    head_size: int,
    way_out: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(UserError, match=way_out) as refusal:
        cpu_kernels(page_format, dtype, GROUP, head_size, PAGE, gaps=True)
    assert "--policy retrieval" in str(refusal.value)
    assert "\n" not in str(refusal.value)
