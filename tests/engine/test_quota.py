# SPDX-License-Identifier: Apache-2.0
"""A server in a control group computes with as many threads as it has cores' worth."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from kvserve.bench.server import free_port
from tests.control_groups import inside, quota_group
from tests.engine.servers import running, wait_until_healthy

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_PROMPT = 1500
_WORKS = 0.2
"""Share of the busiest thread's time from which a thread is one that computes."""


def ask(base: str) -> None:
    body = {"prompt": [7] * _PROMPT, "max_tokens": 32, "ignore_eos": True}
    request = urllib.request.Request(
        f"{base}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 32


def times(process: psutil.Process) -> dict[int, float]:
    return {thread.id: thread.user_time for thread in process.threads()}


def test_a_server_says_its_quota_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("needs two cores, of which one may be used")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    port, log = free_port(), tmp_path / "log"
    command = [
        *(sys.executable, "-m", "kvserve.cli", "serve", "--policy", "retrieval"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--kv-cache-memory-bytes", "256M", "--max-model-len", "2048"),
    ]
    with quota_group(1.0) as group, running(inside(group, command), log) as process:
        base = f"http://127.0.0.1:{port}"
        wait_until_healthy(base, process, log)
        said = f"1 worker x 1 thread on 1 of {cores} cores: the CPU quota is 1"
        assert said in log.read_text()
        server = psutil.Process(process.pid)
        started = [server, *server.children(recursive=True)]
        before = {each.pid: times(each) for each in started}
        ask(base)
        spent = [
            time - before[each.pid].get(thread, 0.0)
            for each in started
            for thread, time in times(each).items()
        ]
    assert len([each for each in spent if each > _WORKS * max(spent)]) == 1
