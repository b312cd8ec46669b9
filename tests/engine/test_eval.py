# SPDX-License-Identifier: Apache-2.0
"""``kvserve eval`` through the real engine, and against a real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvserve.bench.server import free_port
from kvserve.cli import main
from kvserve.processor import default_dtype
from tests.engine.harness import EngineSlot
from tests.engine.servers import users_environment

pytestmark = pytest.mark.engine

_LAST_PAGE = "sink-recent:sinks=1,recent=32"
_SIZE = ("--length", "1024", "--samples", "2")
_SMALL = (*_SIZE, "--policy", _LAST_PAGE)
_TASKS = ("--task", "needle,second-turn,agreement")
_COMMAND = [str(Path(sys.executable).with_name("kvserve"))]


@pytest.fixture(scope="module")
def report(engines: EngineSlot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small report of the embedded model."""
    engines.close()
    out = tmp_path_factory.mktemp("report")
    assert main(["eval", *_SMALL, *_TASKS, "--out", str(out)]) == 0
    return out


def scores(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = json.loads((out / "report.json").read_text())["scores"]
    return {(line["policy"], line["task"]): line for line in lines}


def cells(out: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (out / "cells.jsonl").read_text().splitlines())
    return [record["cell"] for record in records if "cell" in record]


def test_the_full_cache_finds_every_needle_and_agrees_with_itself(
    report: Path,
) -> None:
    found = scores(report)
    for task in ("needle", "second-turn", "agreement"):
        assert found["full", task]["score"] == 1
        assert found["full", task]["memory"]["held"] == 1
    assert found["full", "agreement"]["divergence"] < 0.01


def test_every_line_has_the_speed_of_its_requests(report: Path) -> None:
    for line in scores(report).values():
        assert line["speed"]["tokens_per_second"] > 0
        assert line["speed"]["first_after"] > 0
    timings = [
        record["timing"]
        for record in map(json.loads, (report / "cells.jsonl").read_text().splitlines())
        if "cell" in record
    ]
    assert all(max(one["first_after"]) <= one["seconds"] for one in timings)


def test_the_last_page_alone_finds_nothing_outside_it(report: Path) -> None:
    found = scores(report)
    assert found[_LAST_PAGE, "needle"]["score"] == 0
    assert found[_LAST_PAGE, "second-turn"]["score"] == 0
    assert found[_LAST_PAGE, "agreement"]["score"] < 0.7
    # A page of sinks and a page of recent tokens, of 32.
    held = found[_LAST_PAGE, "needle"]["memory"]["held"]
    assert held == pytest.approx(2 / 32, abs=0.005)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_cells(
    report: Path, tmp_path: Path
) -> None:
    command = [*_COMMAND, "eval", *_SMALL, *_TASKS, "--out", str(tmp_path)]
    # Whatever runs in the background has Ctrl-C switched off, and hands that down.
    process = subprocess.Popen(
        command, env=_environment(), preexec_fn=_listen_to_interrupts
    )
    try:
        _wait(lambda: len(_lines(tmp_path)) >= 2, process)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    first = cells(tmp_path)
    assert first
    assert len(first) < 6
    assert main(["eval", *_SMALL, *_TASKS, "--out", str(tmp_path)]) == 0
    assert cells(tmp_path)[: len(first)] == first
    assert cells(tmp_path) == cells(report)


def _lines(out: Path) -> list[str]:
    path = out / "cells.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _environment() -> dict[str, str]:
    return {**users_environment(), "OMP_WAIT_POLICY": "passive"}


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(ready: Any, process: subprocess.Popen[bytes], seconds: int = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the last page alone, which takes forced tokens."""
    port = free_port()
    command = [
        *(*_COMMAND, "serve", "--host", "127.0.0.1", "--port", str(port)),
        *("--policy", "sink-recent", "--policy-arg", "sinks=1"),
        *("--policy-arg", "recent=32", "--dtype", default_dtype(), "--enforce-eager"),
        *("--kv-cache-memory-bytes", "256M", "--max-model-len", "1024"),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "2048"),
        *("--logits-processors", "kvserve.engine.worker.forced_tokens:ForcedTokens"),
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment()
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: _is_healthy(url), process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def test_a_server_scores_as_its_policy_does_here(
    report: Path, server: str, tmp_path: Path
) -> None:
    asked = [*_SIZE, *_TASKS]
    # The full cache's replies are taken from the report.
    (tmp_path / "cells.jsonl").write_text((report / "cells.jsonl").read_text())
    assert main(["eval", *asked, "--url", server, "--out", str(tmp_path)]) == 0
    found = scores(tmp_path)
    for task in ("needle", "second-turn"):
        assert found["server", task]["score"] == 0
    here = scores(report)[_LAST_PAGE, "agreement"]
    there = found["server", "agreement"]
    assert there["score"] == pytest.approx(here["score"], abs=0.05)
    assert there["divergence"] == pytest.approx(here["divergence"], rel=0.1)


def test_protected_system_prompts_are_held_beside_the_budget(
    engines: EngineSlot, tmp_path: Path
) -> None:
    engines.close()
    policy = "sink-recent:sinks=1,recent=96"
    asked = ("--task", "system-facts", "--length", "1024", "--samples", "4")
    found: list[dict[str, Any]] = []
    for out, more in (("off", ()), ("on", ("--protect", "system"))):
        command = [*asked, *more, "--policy", policy, "--out", str(tmp_path / out)]
        assert main(["eval", *command]) == 0
        found += [one for one in cells(tmp_path / out) if one["policy"] == policy]
    off, on = found
    # A system prompt of some 160 tokens: 5 or 6 pages for each of 90 heads, not 1.
    pairs = zip(off["pages_held"], on["pages_held"], strict=True)
    assert all(4 <= (spared - held) / 90 <= 5 for held, spared in pairs)
    assert sum(on["scores"]) > sum(off["scores"])
