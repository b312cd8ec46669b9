# SPDX-License-Identifier: Apache-2.0
"""The scale-out example: a router over two replicas, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine.conftest import Model
from tests.engine.servers import free_ports, metric, running, wait_until_healthy

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "deploy" / "scale-out" / "replicas.py"
REQUESTS, CLIENTS, STREAMS = 24, 4, 8
SHORT, LONG = 24, 900


@dataclass(frozen=True)
class Fleet:
    """The router's URL, and its replicas' URLs and processes."""

    router: str
    replicas: dict[str, int]

    def client(self) -> openai.OpenAI:
        """A client that tries nothing twice: what is lost shows."""
        return openai.OpenAI(
            base_url=f"{self.router}/v1", api_key="none", timeout=120, max_retries=0
        )

    def finished(self) -> dict[str, float]:
        """Requests that each living replica has answered."""
        return {
            url: sum(metric(url, "vllm:request_success_total").values())
            for url, process in self.replicas.items()
            if Path(f"/proc/{process}").exists()
        }

    def is_healthy(self, replica: str) -> bool:
        """What the router thinks of a replica."""
        with urllib.request.urlopen(f"{self.router}/workers", timeout=10) as reply:
            workers = json.load(reply)["workers"]
        return bool({w["url"]: w["is_healthy"] for w in workers}[replica])


@pytest.fixture(scope="module")
def fleet(
    models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    model, logs = models["tiny-gqa"], tmp_path_factory.mktemp("fleet")
    port = free_ports(4)
    command = [
        *(sys.executable, "-u", str(SCRIPT), "--port", str(port), "--logs", str(logs)),
        *("--", str(model.path), "--served-model-name", "tiny", "--enforce-eager"),
        *("--policy", "sink-recent", "--policy-arg", "recent=64"),
        *("--dtype", "float32", "--kv-cache-memory-bytes", "64M"),
        *("--max-model-len", "1024", "--max-num-seqs", "8"),
    ]
    output = logs / "output"
    with running(command, output) as process:
        router = f"http://127.0.0.1:{port}"
        wait_until_healthy(router, process, output)
        pairs = re.findall(r"replica (\S+) process (\d+)", output.read_text())
        fleet = Fleet(router, {url: int(process) for url, process in pairs})
        assert len(fleet.replicas) == 2
        yield fleet


def _prompt(number: int) -> str:
    return " ".join(f"w{8 + (number * 31 + word) % 500}" for word in range(50))


def _complete(client: openai.OpenAI, number: int) -> str:
    reply = client.completions.create(
        model="tiny",
        prompt=_prompt(number),
        max_tokens=SHORT,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == SHORT
    return reply.choices[0].text


def _complete_all(fleet: Fleet) -> list[str]:
    client = fleet.client()
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda n: _complete(client, n), range(REQUESTS)))


def _stream(client: openai.OpenAI, number: int, started: list[int]) -> bool:
    """Read a long reply; tell whether all of it came."""
    chunks = client.completions.create(
        model="tiny",
        prompt=_prompt(number),
        max_tokens=LONG,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    reason = None
    try:
        for chunk in chunks:
            if number not in started:
                started.append(number)
            reason = chunk.choices[0].finish_reason or reason
    except (openai.APIError, httpx.HTTPError):
        return False
    return reason == "length"


def test_a_killed_replica_loses_only_the_streams_it_had_begun(fleet: Fleet) -> None:
    expected = _complete_all(fleet)
    assert len(set(expected)) > REQUESTS // 2
    assert set(fleet.finished().values()) == {REQUESTS / 2}

    doomed, survivor = fleet.replicas
    client, started = fleet.client(), list[int]()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams: list[Future[bool]] = [
            pool.submit(_stream, client, number, started) for number in range(STREAMS)
        ]
        _wait_for(lambda: len(started) == STREAMS)
        running_there = metric(doomed, "vllm:num_requests_running")["0"]
        assert 0 < running_there < STREAMS
        os.killpg(fleet.replicas[doomed], signal.SIGKILL)
        # New requests come at once, before any health check can have noticed.
        assert _complete_all(fleet) == expected
        complete = [stream.result() for stream in streams]
    assert complete.count(False) == running_there

    _wait_for(lambda: not fleet.is_healthy(doomed))
    assert fleet.is_healthy(survivor)
    assert _complete_all(fleet) == expected
    answered = REQUESTS / 2 + 2 * REQUESTS + complete.count(True)
    assert fleet.finished() == {survivor: answered}


def _wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_router_the_example_says_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    found = subprocess.run(
        [str(python), str(SCRIPT)], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert found.stderr.strip().endswith("pip install 'kvserve[scale]'")
