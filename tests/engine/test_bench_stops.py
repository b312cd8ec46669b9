# SPDX-License-Identifier: Apache-2.0
"""A benchmark that is stopped, or killed, leaves none of its server's processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine.servers import users_environment

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_SECONDS = 300


def has_engine(processes: list[psutil.Process]) -> bool:
    return any("EngineCor" in " ".join(each.cmdline()) for each in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "kvserve.cli", "bench", "--policy", "full"),
        *("--kv-memory", "128MiB", "--", "--enforce-eager", "--max-model-len", "1024"),
    ]
    with subprocess.Popen(
        command, env=users_environment(), cwd=tmp_path, start_new_session=True
    ) as bench:
        server: list[psutil.Process] = []
        deadline = time.monotonic() + _SECONDS
        while not has_engine(server):
            assert bench.poll() is None
            assert time.monotonic() < deadline
            server = psutil.Process(bench.pid).children(recursive=True)
            time.sleep(0.5)
        # As a terminal does: to the group of the benchmark.
        os.killpg(bench.pid, number)
        bench.wait(90)
    _, left = psutil.wait_procs(server, timeout=30)
    assert left == []
