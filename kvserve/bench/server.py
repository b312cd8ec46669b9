# SPDX-License-Identifier: Apache-2.0
"""A server of our own, started as a user would start it, and stopped again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from kvserve.errors import UserError

_START_SECONDS = 900
_STOP_SECONDS = 60


@contextlib.contextmanager
def running_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run ``kvserve serve`` with ``flags`` on a free port; yield its base URL.

    Args:
        flags: what follows ``kvserve serve``, host and port excepted.
        log: file that the server's output is appended to.

    Raises:
        UserError: the server ends before it is healthy; says why as far as it said.
    """
    port = _free_port()
    command = [sys.executable, "-m", "kvserve.cli", "serve", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log"]
    # Whoever ends us by SIGTERM ends our server as well: an exit runs `finally`.
    before = signal.signal(signal.SIGTERM, _exit)
    # A client may run quietly; a log file may say what it has to say.
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(base_url, process, log)
        yield base_url
    finally:
        _stop(process)
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(
    base_url: str, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"the server was not healthy after {_START_SECONDS} s; see {log}"
            )
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"the server did not start: {_last_words(log)}; see {log}")


def _last_words(log: Path) -> str:
    """The line of the log that says best why a server ended."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    for marker in ("kvserve: error:", "error: ", "Error: "):
        for line in reversed(lines):
            if marker in line:
                return line.partition(marker)[2] or line
    return lines[-1] if lines else "it printed nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
