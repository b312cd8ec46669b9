# SPDX-License-Identifier: Apache-2.0
"""A benchmark leaves nothing behind of the server that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvserve.bench import server

_SERVER = """
import os, signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1);"
child = subprocess.Popen(
    [sys.executable, "-u", "-c", deaf + "time.sleep(600)"], stdout=subprocess.PIPE
)
child.stdout.readline()
print(child.pid, flush=True)
{then}
"""
_WAITS = "time.sleep(600)"
_IS_DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
_ENDS = "sys.exit(1)"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def started(then: str, log: Path) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A server whose child takes no notice of SIGTERM, and that child."""
    process = server.start([sys.executable, "-c", _SERVER.format(then=then)], log)
    deadline = time.monotonic() + 30
    while not log.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, psutil.Process(int(log.read_text()))


def assert_gone(process: subprocess.Popen[bytes], child: psutil.Process) -> None:
    assert process.returncode is not None
    _, left = psutil.wait_procs([child], timeout=10)
    assert left == []


@pytest.mark.parametrize("then", [_WAITS, _IS_DEAF, _ENDS])
def test_all_processes_end(
    then: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_STOP_SECONDS", 1)
    process, child = started(then, log)
    if then == _ENDS:
        process.wait(30)
    server.stop(process)
    assert_gone(process, child)


def test_a_second_ctrl_c_ends_them_at_once(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, child = started(_IS_DEAF, log)
    wait = process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is None:
            return wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop(process)
    assert_gone(process, child)


@pytest.fixture
def handlers() -> Iterator[None]:
    # A shell that starts tests in the background has them ignore Ctrl-C.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {each: signal.getsignal(each) for each in before} == before
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_benchmark_ends_its_server(
    number: signal.Signals, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is one of ours that is still to become healthy."""
    found = ended_by(number, log, monkeypatch, while_it_forks=False)
    assert_gone(*found)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_comes_while_a_server_is_forked_ends_it_as_well(
    number: signal.Signals, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ended_by(number, log, monkeypatch, while_it_forks=True)
    assert_gone(*found)


def ended_by(
    number: signal.Signals,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    while_it_forks: bool,
) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """The server of a benchmark that a signal has ended, and the server's child."""
    found: list[tuple[subprocess.Popen[bytes], psutil.Process]] = []

    def start(_: object, log: Path) -> subprocess.Popen[bytes]:
        monkeypatch.setattr(server, "start", real)
        found.append(started(_WAITS, log))
        if while_it_forks:
            signal.raise_signal(number)
        return found[0][0]

    def healthy(*_: object) -> None:
        assert not while_it_forks
        signal.raise_signal(number)

    real = server.start
    monkeypatch.setattr(server, "start", start)
    monkeypatch.setattr(server, "_wait_until_healthy", healthy)
    with (
        pytest.raises((SystemExit, KeyboardInterrupt)),
        server.running_server([], log),
    ):
        pass
    return found[0]


_BENCHMARK = """
import sys, time
from pathlib import Path
from kvserve.bench import server
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
process = server.start(sleeps, Path({log!r}))
print(process.pid, flush=True)
time.sleep(600)
"""


def test_a_server_ends_with_a_benchmark_that_is_killed(log: Path) -> None:
    command = [sys.executable, "-c", _BENCHMARK.format(log=str(log))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as benchmark:
        assert benchmark.stdout is not None
        started = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.kill()
    _, left = psutil.wait_procs([started], timeout=10)
    assert left == []
