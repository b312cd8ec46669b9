# SPDX-License-Identifier: Apache-2.0
"""A server of our own, started as a user would start it, and stopped again."""

from __future__ import annotations

import contextlib
import ctypes
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
_LIBC = ctypes.CDLL(None)  # looked up here: a new process should do little
_PR_SET_PDEATHSIG = 1
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def running_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Run ``kvserve serve`` with ``flags`` on a free port; yield its base URL.

    Args:
        flags: what follows ``kvserve serve``, host and port excepted.
        log: file that the server's output is appended to.

    Raises:
        UserError: the server ends before it is healthy; says why as far as it said.
    """
    port = free_port()
    command = [sys.executable, "-m", "kvserve.cli", "serve", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log"]
    # Whoever ends us by a signal ends our server as well: an exit runs `finally`.
    before = {number: signal.signal(number, _exit) for number in _ENDINGS}
    process = None
    try:
        try:
            with _signals_held_back():
                process = start(command, log)
            base_url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(base_url, process, log)
            yield base_url
        finally:
            if process is not None:
                stop(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Have signals that end us wait: a server just forked has no name to end it by."""
    held: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _: held.append(number))
        for each in (*_ENDINGS, signal.SIGINT)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in held:
            signal.raise_signal(number)


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server in a group of its own, which no Ctrl-C reaches but :func:`stop`.

    Args:
        log: file that its output is appended to.
    """
    # A client may run quietly; a log file may say what it has to say.
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("a") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    """Have the system end this process by SIGTERM after one that is killed hard."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, and kill what is left of its group, come what may."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also where it ended by itself, or a second Ctrl-C cut the waiting short.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def free_port() -> int:
    """Find a port of 127.0.0.1 that nobody listens on."""
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
