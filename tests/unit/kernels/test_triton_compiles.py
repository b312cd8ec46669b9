# SPDX-License-Identifier: Apache-2.0
"""The GPU's kernels compile for GPUs, without one: no operation that a GPU lacks, and
no more of its registers and fast memory than it has.

What they compute is for ``tests/kernels``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvserve.kernels import triton_pages, triton_rows
from kvserve.kernels.page_formats import FP8, INT8, PageFormat
from kvserve.kernels.score_form import Positions, RowScores, ScoreForm
from tests.unit.gpu_compiler import Compiled, compiling_for
from tests.unit.score_forms import FORMS, make_form

ROWS, PAGES, PAGE_SIZE, WIDTH = 4, 8, 32, 4096
LEAST_SHARED = 99 << 10
"""Bytes that a program may have on the smaller GPUs (8.6, 8.9)."""
MOST_SPILLED = 8
"""Bytes: one value aside, where the assembler prefers one more program at a time."""
SHAPES = {"Llama-3.1-8B": (4, 128), "SmolLM2-135M": (3, 64), "one KV head": (8, 256)}


def launch(
    dtype: torch.dtype,
    group: int,
    head_size: int,
    queries: int,
    page_format: PageFormat | None = None,
    form: ScoreForm | None = None,
    has_gaps: bool = False,
) -> None:
    """Write, copy, and attend as a step of ``queries`` a row does, with statistics."""
    pool = torch.zeros(PAGES, 1, PAGE_SIZE, 2 * head_size, dtype=dtype)
    if page_format:
        shape = page_format.pool_shape(PAGES, PAGE_SIZE, head_size)
        pool = torch.zeros(shape, dtype=page_format.pool)
    query = torch.zeros(ROWS * queries, group, head_size, dtype=dtype)
    rows = (
        torch.arange(ROWS + 1, dtype=torch.int32) * queries,
        torch.ones(ROWS, dtype=torch.int32),
        torch.zeros(ROWS, WIDTH, dtype=torch.int32),
    )
    mass = triton_rows.Mass(
        torch.zeros(PAGES, PAGE_SIZE), torch.zeros(PAGES, PAGE_SIZE, group)
    )
    key = torch.zeros(ROWS, head_size, dtype=dtype)
    slots = torch.zeros(ROWS, dtype=torch.int64)
    triton_pages.write_rows(key, key, pool, slots, page_format)
    triton_pages.copy_pages(pool, *torch.zeros(2, 1, dtype=torch.int64))
    own = torch.zeros(len(query), dtype=torch.int32)
    positions = Positions(torch.zeros(PAGES, PAGE_SIZE, dtype=torch.int32), own)
    scores = RowScores(form, rows[0], positions) if form else None
    gaps = torch.zeros(ROWS, 2, dtype=torch.int32) if has_gaps else None
    # No policy adds up what rows with gaps draw.
    for statistics in (None,) if has_gaps else (None, mass):
        out = torch.empty_like(query)
        triton_rows.row_attention(
            query, pool, *rows, 1.0, out, queries, statistics, page_format, scores, gaps
        )


@pytest.fixture(scope="module")
def of_shape(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[int, str], list[Compiled]]:
    """Kernels of each GPU and shape, decode and prompts in bfloat16."""
    folder = tmp_path_factory.mktemp("triton")
    found = {}
    for capability in (80, 90):
        for name, shape in SHAPES.items():
            with (
                pytest.MonkeyPatch.context() as patch,
                compiling_for(capability, folder, patch) as compiled,
            ):
                launch(torch.bfloat16, *shape, queries=512)
            found[capability, name] = compiled
    return found


Kernels = dict[tuple[int, str], list[Compiled]]


def test_every_kernel_compiles_and_fits_the_smaller_gpus(of_shape: Kernels) -> None:
    for compiled in of_shape.values():
        names = {kernel.name for kernel in compiled}
        assert names == {
            "split_kernel", "join_kernel", "tile_kernel", "mass_kernel",
            "_write_kernel", "_copy_kernel",
        }  # fmt: skip
        assert max(kernel.shared_bytes for kernel in compiled) <= LEAST_SHARED


def test_no_kernel_runs_out_of_registers_on_an_h100(of_shape: Kernels) -> None:
    spilling = {
        (shape, kernel.name)
        for (capability, shape), compiled in of_shape.items()
        for kernel in compiled
        if capability == 90 and kernel.spilled_bytes > MOST_SPILLED
    }
    assert not spilling


def test_matrices_are_multiplied_by_tensor_cores(of_shape: Kernels) -> None:
    for (capability, _), compiled in of_shape.items():
        (tile,) = {k.ptx for k in compiled if k.name == "tile_kernel"}
        assert ("wgmma" if capability == 90 else "mma.sync") in tile


def test_decode_fetches_ahead(of_shape: Kernels) -> None:
    for compiled in of_shape.values():
        for kernel in compiled:
            assert kernel.name != "split_kernel" or "cp.async" in kernel.ptx


@pytest.mark.parametrize("page_format", [INT8, FP8], ids=lambda it: it.name)
def test_kernels_of_pages_of_bytes_compile_and_fit(
    page_format: PageFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compiling_for(90, tmp_path, monkeypatch) as compiled:
        launch(torch.bfloat16, 4, 128, 512, page_format)
    assert max(kernel.shared_bytes for kernel in compiled) <= LEAST_SHARED
    spilled = {kernel.name: kernel.spilled_bytes for kernel in compiled}
    assert max(spilled.values()) <= MOST_SPILLED, spilled


@pytest.mark.parametrize(
    ("group", "head_size", "parts"),
    [(2, 256, "cap"), (4, 128, FORMS[-1])],
    ids=["Gemma 2", "all"],
)
def test_kernels_of_a_form_compile_and_fit(
    group: int,
    head_size: int,
    parts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = make_form(parts, group)
    with compiling_for(90, tmp_path, monkeypatch) as compiled:
        launch(torch.bfloat16, group, head_size, 512, form=form)
    assert max(kernel.shared_bytes for kernel in compiled) <= LEAST_SHARED
    spilled = {kernel.name: kernel.spilled_bytes for kernel in compiled}
    assert max(spilled.values()) <= MOST_SPILLED, spilled


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_rows_with_gaps_compile_and_fit(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compiling_for(capability, tmp_path, monkeypatch) as compiled:
        launch(torch.bfloat16, 4, 128, 512, has_gaps=True)
    assert max(kernel.shared_bytes for kernel in compiled) <= LEAST_SHARED
    spilled = {kernel.name: kernel.spilled_bytes for kernel in compiled}
    assert capability < 90 or max(spilled.values()) <= MOST_SPILLED, spilled


def test_a_kernel_that_spills_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = triton_rows.Tile(256, 64, num_warps=4, num_stages=1)
    monkeypatch.setattr(triton_rows, "many_queries_tile", lambda *_: tile)
    with compiling_for(90, tmp_path, monkeypatch) as compiled:
        launch(torch.bfloat16, 4, 128, queries=512)
    assert max(kernel.spilled_bytes for kernel in compiled) > MOST_SPILLED
