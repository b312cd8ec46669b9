# SPDX-License-Identifier: Apache-2.0
"""Servers that tests start as a user would, and stop by SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvserve.bench.server import end_with_parent, free_port

_START_SECONDS = 600


@contextlib.contextmanager
def running_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run ``kvserve serve`` on a free port; yield its URL once it is healthy."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("kvserve")), "serve", *flags),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--disable-uvicorn-access-log"),
    ]
    with running(command, log) as process:
        base = f"http://127.0.0.1:{port}"
        wait_until_healthy(base, process, log)
        yield base


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as typed in a shell of its own, without the tests' settings."""
    process = start(command, log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM, 143)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start what :func:`running` runs; whoever asks for it ends it."""
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=users_environment(),
            preexec_fn=end_with_parent,
        )


def users_environment() -> dict[str, str]:
    """The environment without the settings that tests made for themselves."""
    return {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}


def wait_until_healthy(
    base: str,
    process: subprocess.Popen[bytes],
    log: Path,
    seconds: float = _START_SECONDS,
) -> None:
    wait_until_answered(f"{base}/health", process, log, seconds)


def wait_until_answered(
    url: str, process: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    """Wait for a first good answer of a server, which writes to ``log``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} gave no answer in time: {log.read_text()[-3000:]}")


def free_ports(count: int) -> int:
    """Find the first of ``count`` free ports in a row."""
    while True:
        first = free_port()
        with (
            contextlib.suppress(OSError, OverflowError),
            contextlib.ExitStack() as held,
        ):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def metric(base: str, name: str) -> dict[str, float]:
    """Read a Prometheus metric of a server, by its engine."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if match := re.match(rf'{re.escape(name)}{{.*?engine="(\d+)".*}} (.*)', line):
            engine, value = match.groups()
            found[engine] = found.get(engine, 0) + float(value)
    return found
