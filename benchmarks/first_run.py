# SPDX-License-Identifier: Apache-2.0
"""A new user's first minute: from a clone to an answer, and what the terminal shows.

    python -m benchmarks.first_run                 # clones, installs, serves: minutes
    python -m benchmarks.first_run --installed     # only the rows of a later start

The clone has a home of its own for kvserve's and vLLM's caches; packages come from the
package cache of this machine, if it is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvserve.bench.server import free_port

_ROOT = Path(__file__).resolve().parent.parent
_QUESTION = "What is the capital of France?"
_MODEL = "SmolLM2-135M-Instruct"
_DEADLINE = 1200.0


@dataclass
class Server:
    """A server that was started like a new user's.

    Attributes:
        port: where it listens.
        log: file of what the terminal shows.
        began: ``time.monotonic()`` of the command.
    """

    port: int
    log: Path
    began: float

    def ask(self) -> str:
        """Ask the README's question with nothing set; return the answer."""
        body = {"model": _MODEL, "messages": [{"role": "user", "content": _QUESTION}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_DEADLINE) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])

    def first_answer(self) -> float:
        """Seconds from the command to an answer."""
        while time.monotonic() < self.began + _DEADLINE:
            try:
                self.ask()
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
            else:
                return time.monotonic() - self.began
        raise TimeoutError(self.log.read_text())

    def lines_before_ready(self) -> int:
        """Lines that the terminal showed before the block that says how to ask."""
        text = self.log.read_text().partition("kvserve is ready")[0]
        return len([line for line in text.splitlines() if line.strip()])


@contextmanager
def serving(folder: Path, home: Path, serve: list[str]) -> Iterator[Server]:
    """Run a command that serves, and end it as Ctrl-C does."""
    port = free_port()
    log = home / f"{port}.log"
    environment = {
        **os.environ,
        "KVSERVE_CACHE": str(home / "kvserve-cache"),
        "VLLM_CACHE_ROOT": str(home / "vllm-cache"),
    }
    command = [part.format(port=port) for part in serve]
    with log.open("wb") as file:
        server = Server(port, log, time.monotonic())
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield server
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """Print the rows of a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--installed", action="store_true", help="do not clone")
    parser.add_argument("--tries", type=int, default=20)
    args = parser.parse_args()
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="kvserve-first-run-") as scratch:
        home = Path(scratch)
        folder = _ROOT
        serve = [sys.executable, "-m", "kvserve.cli", "serve"]
        serve += ["--port", "{port}", "--kv-cache-memory-bytes", "1G"]
        if not args.installed:
            folder = home / "kvserve"
            run = ["git", "clone", "-q", str(_ROOT), str(folder)]
            subprocess.run(run, check=True)
            flags = "--host 127.0.0.1 --port {port} --kv-cache-memory-bytes 1G"
            serve = ["make", "serve", f"SERVE_ARGS={flags}"]
        with serving(folder, home, serve) as server:
            first = "start with empty caches" if args.installed else "fresh clone"
            rows.append(
                (f"{first} to the first answer", f"{server.first_answer():.0f} s")
            )
        with serving(folder, home, serve) as server:
            seconds = server.first_answer()
            rows.append(("second start to the first answer", f"{seconds:.0f} s"))
            lines = server.lines_before_ready()
            rows.append(("lines on the terminal before the block", str(lines)))
            right = sum("Paris" in server.ask() for _ in range(args.tries))
            rows.append(("answers that name Paris", f"{right} of {args.tries}"))
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
