# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark measures what it says, in small, on whatever runs Triton."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tests.kernels.cases import INTERPRETED

# After the check that there is something to run Triton.
from benchmarks import gpu_rows  # isort: skip

pytestmark = pytest.mark.gpu


def once(run: Callable[[], object]) -> gpu_rows.Timing:
    run()
    return gpu_rows.Timing(1.0, 0.9, 1.1)


@pytest.mark.skipif(not INTERPRETED, reason="the benchmark itself does more")
def test_every_line_of_the_table_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter multiplies bfloat16 matrices as if they were integers, and no
    # CPU has FlashAttention in float32.
    monkeypatch.setattr(gpu_rows, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_rows, "DTYPE", torch.float32)
    monkeypatch.setattr(gpu_rows, "KV_HEADS", 2)
    monkeypatch.setattr(gpu_rows, "QUERY_HEADS", 8)
    monkeypatch.setattr(gpu_rows, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_rows, "measure", once)
    arguments = argparse.Namespace(
        page_size=32, requests=1, context=[256], chunk=64, kept=0.125
    )
    lines = gpu_rows.tables(arguments)
    assert len(lines) == 6 + 3 + 2
    assert all(len(cells) == 5 for cells in lines)
    assert "12.5% kept" in lines[4][0]


def test_the_command_needs_no_vllm() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['attention', '--device', 'cuda', '--help']\n"
        "try: runpy.run_module('benchmarks.attention', run_name='__main__')\n"
        "finally: assert 'vllm' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--context" in done.stdout
