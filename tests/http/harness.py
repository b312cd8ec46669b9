# SPDX-License-Identifier: Apache-2.0
"""A server as users start it: `kvserve serve` in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvserve.bench.server import free_port
from tests.engine.servers import start, wait_until_healthy

MODEL = "SmolLM2-135M-Instruct"
KEY = "a-key-for-tests"
BODY_LIMIT = 1 << 20
_START_SECONDS = 300
_OPTIONS = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", "256M", "--max-model-len", "2048"),
    *("--max-num-seqs", "16", "--disable-uvicorn-access-log"),
    *("--max-body-size", "1MiB"),
)


class Server:
    """Starts the command as typed and waits until it is healthy.

    Args:
        directory: for its log.
        options: beside the usual ones.
        key: the API key that it wants, if any.
    """

    def __init__(self, directory: Path, *options: str, key: str | None = None) -> None:
        self.port = free_port()
        self.base, self.key = f"http://127.0.0.1:{self.port}", key
        self._log = directory / "log"
        command = [
            *(str(Path(sys.executable).with_name("kvserve")), "serve"),
            *("--port", str(self.port), *_OPTIONS, *options),
            *(("--api-key", key) if key else ()),
        ]
        self.process = start(command, self._log)
        try:
            wait_until_healthy(self.base, self.process, self._log, _START_SECONDS)
        except AssertionError:
            self._kill()
            raise

    def client(self, **options: Any) -> httpx.Client:
        """Return a client that sends the key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(
            **{"base_url": self.base, "headers": headers, "timeout": 120, **options}
        )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """The API processes and the engine, which holds the worker if that is one."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def engine_core(self) -> psutil.Process:
        (found,) = [p for p in self.processes() if "EngineCore" in p.name()] or [
            p for p in self.processes() if "EngineCor" in " ".join(p.cmdline())
        ]
        return found

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill()
            raise

    def _kill(self) -> None:
        """Kill all its processes."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def completion(prompt: str, max_tokens: int, **options: Any) -> dict[str, Any]:
    """The body of a greedy request for a completion of just that length."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **options,
    }
