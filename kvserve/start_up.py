# SPDX-License-Identifier: Apache-2.0
"""What `kvserve serve` shows while it starts: its progress, then how to use it.

Imports no vLLM: silence must be asked for before vLLM is imported.
"""

from __future__ import annotations

import enum
import logging
import mmap
import os
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.errors import UserError

VERBOSE = "--verbose"
WATCHER = "kvserve-progress"
"""The name of the thread that shows progress."""
_LEVEL = "VLLM_LOGGING_LEVEL"
_POLL_SECONDS = 0.25
_WIDTH = 100
_BEGAN = time.monotonic()  # the command imports this first


def be_quiet(argv: Sequence[str]) -> bool:
    """Silence all but errors in this process and those it starts, unless asked not to.

    ``--verbose`` shows everything, and so does a level that the user set.
    """
    if VERBOSE in argv or _LEVEL in os.environ:
        return False
    os.environ[_LEVEL] = "ERROR"
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What is logged and warned of before vLLM has read its environment.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return True


@dataclass(frozen=True)
class Address:
    """Where the server will listen."""

    host: str
    port: int
    tls: bool = False

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"

    @classmethod
    def of(cls, host: str | None, port: int, tls: bool) -> Address:
        """Name an address that can be asked: one, where the server takes any."""
        anywhere = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1"}
        return cls({**anywhere, "::": "::1"}.get(host, host or ""), port, tls)

    def check_free(self) -> None:
        """Refuse a port where somebody else answers.

        Raises:
            UserError: names the flag.
        """
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return
        raise UserError(
            f"--port {self.port}: something listens on {self.host} already; stop it, "
            f"or give another port, such as --port {self.port + 1}"
        )

    def answers(self) -> bool:
        """Tell whether the server is healthy."""
        # A certificate is often one's own, and nothing is sent.
        context = ssl._create_unverified_context() if self.tls else None
        try:
            with urllib.request.urlopen(
                f"{self.url}/health", timeout=2, context=context
            ) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Phase(enum.IntEnum):
    """What a start is doing."""

    STARTING = 0
    LOADING = 1
    WARMING = 2
    OPENING = 3

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Phase.STARTING: "starting the engine",
    Phase.LOADING: "loading the model",
    Phase.WARMING: "warming up the model (compiling it, where that was asked for)",
    Phase.OPENING: "opening the server",
}
_capacity: list[str] = []
_phase = mmap.mmap(-1, 1)  # memory that an engine forked from this process shares


def enter(phase: Phase) -> None:
    """Say what a start is doing now, in the process that does it."""
    _phase[0] = phase


def tell_capacity(line: str) -> None:
    """Say what the KV cache holds, which only an engine that runs knows."""
    _capacity[:] = [line]


class Progress:
    """A line that says how long a start has taken so far, until the server answers.

    The process may be forked at any time: no lock that the line needs is held then.

    Args:
        address: of the server.
        model: the name that requests give.
        policy: the policy in words.
    """

    def __init__(self, address: Address, model: str, policy: Sequence[str]) -> None:
        self._address, self._model, self._policy = address, model, policy
        self._on_terminal = sys.stderr.isatty()
        self._quiet = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name=WATCHER, daemon=True)

    def start(self) -> None:
        """Watch beside what starts the server."""
        if not self._on_terminal:
            print("kvserve: starting the engine", file=sys.stderr, flush=True)
        os.register_at_fork(
            before=self._quiet.acquire,
            after_in_parent=self._quiet.release,
            after_in_child=self._quiet.release,
        )
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over():
            time.sleep(_POLL_SECONDS)

    def _is_over(self) -> bool:
        with self._quiet:
            seconds = time.monotonic() - _BEGAN
            if not self._address.answers():
                self._show(f"kvserve: {Phase(_phase[0]).words}, {seconds:.0f} s")
                return False
            self._show("")
            lines = [
                f"\nkvserve is ready on {self._address.url} (after {seconds:.0f} s)",
                *_ready_block(self._address, self._model, self._policy, _capacity),
            ]
            print("\n".join(lines), file=sys.stderr, flush=True)
            return True

    def _show(self, text: str) -> None:
        if self._on_terminal:
            print(f"\r{text:<{_WIDTH}}\r", end="", file=sys.stderr, flush=True)


def _ready_block(
    address: Address, model: str, policy: Sequence[str], capacity: Sequence[str]
) -> list[str]:
    """Say what is served and how to ask."""
    question = (
        f'{{"model": "{model}", "messages": [{{"role": "user", '
        '"content": "What is the capital of France?"}]}'
    )
    return [
        f"  model      {model}",
        *_row("policy", policy),
        *_row("KV cache", capacity),
        f"  dashboard  {address.url}/dashboard",
        f"  ask        curl {address.url}/v1/chat/completions \\",
        "               -H 'Content-Type: application/json' \\",
        f"               -d '{question}'",
        "  stop       Ctrl-C",
        "",
    ]


def _row(name: str, lines: Sequence[str]) -> list[str]:
    names = [name, *[""] * len(lines)]
    return [f"  {head:<10} {line}" for head, line in zip(names, lines, strict=False)]
