# SPDX-License-Identifier: Apache-2.0
"""What `kvserve serve` shows while it starts: its progress, then how to use it.

Imports no vLLM: silence must be asked for before vLLM is imported.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.errors import UserError

VERBOSE = "--verbose"
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


class Progress:
    """A line that says how long a start has taken so far, until the server answers.

    Args:
        address: of the server.
        ready: lines to print when it answers.
    """

    def __init__(self, address: Address, ready: Sequence[str]) -> None:
        self._address, self._ready = address, ready
        self._on_terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Watch beside what starts the server."""
        if not self._on_terminal:
            print("kvserve: starting the engine", file=sys.stderr, flush=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._address.answers():
            seconds = time.monotonic() - _BEGAN
            self._show(
                f"kvserve: starting the engine and loading the model, {seconds:.0f} s"
            )
            time.sleep(_POLL_SECONDS)
        self._show("")
        seconds = time.monotonic() - _BEGAN
        head = f"\nkvserve is ready on {self._address.url} (after {seconds:.0f} s)"
        print("\n".join([head, *self._ready]), file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        if self._on_terminal:
            print(f"\r{text:<{_WIDTH}}\r", end="", file=sys.stderr, flush=True)


def ready_block(address: Address, model: str, about: Sequence[str]) -> list[str]:
    """Say what is served and how to ask.

    Args:
        model: the name that requests give.
        about: the policy, and what fits.
    """
    question = (
        f'{{"model": "{model}", "messages": [{{"role": "user", '
        '"content": "What is the capital of France?"}]}'
    )
    return [
        f"  model      {model}",
        *(f"  {line}" for line in about),
        f"  dashboard  {address.url}/dashboard",
        f"  ask        curl {address.url}/v1/chat/completions \\",
        "               -H 'Content-Type: application/json' \\",
        f"               -d '{question}'",
        "  stop       Ctrl-C",
        "",
    ]
