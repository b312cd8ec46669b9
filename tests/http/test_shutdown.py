# SPDX-License-Identifier: Apache-2.0
"""How a server ends: in good order when told to, with an error when its engine dies."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.http.harness import Server, completion

pytestmark = pytest.mark.engine

RUNNING, TOKENS = 4, 120


class Reader:
    """Reads a streamed reply to its end and counts what comes."""

    def __init__(self, server: Server) -> None:
        self._server, self.chunks = server, 0

    def read(self) -> list[str]:
        """Return the events of the reply."""
        body = completion("Once upon a time", TOKENS, stream=True)
        found = []
        with (
            self._server.client() as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200
            for line in response.iter_lines():
                if line:
                    found.append(line.removeprefix("data: "))
                    self.chunks += 1
        return found


def is_draining(client: httpx.Client) -> bool:
    return client.get("/health").status_code == 503


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("api_servers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_finishes_what_runs_and_refuses_what_is_new(
    tmp_path: Path, api_servers: int
) -> None:
    server = Server(
        tmp_path, "--shutdown-timeout", "90", "--api-server-count", str(api_servers)
    )
    readers = [Reader(server) for _ in range(RUNNING)]
    with ThreadPoolExecutor(RUNNING) as pool, server.client() as client:
        replies = [pool.submit(reader.read) for reader in readers]
        wait_for(lambda: all(reader.chunks > 3 for reader in readers), 60)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: is_draining(client), 10)
        refused = client.post("/v1/completions", json=completion("a", 2))
        assert not any(reply.done() for reply in replies)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["code"] == 503
        check_replies(replies)
    assert server.process.wait(timeout=60) in (0, -signal.SIGTERM, 143)


def check_replies(replies: list[Future[list[str]]]) -> None:
    """Every reply has all its tokens and its end."""
    for reply in replies:
        *chunks, end = reply.result(timeout=120)
        assert end == "[DONE]"
        assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("flags", [(), ("--shutdown-timeout", "2")])
def test_what_is_not_done_in_time_ends_with_what_there_is(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """vLLM kills the engine, and may wait for good for replies that it owes."""
    server = Server(tmp_path, *flags)
    body = completion("Once upon a time", 2000)
    with ThreadPoolExecutor(RUNNING) as pool, server.client() as client:
        replies = [
            pool.submit(client.post, "/v1/completions", json=body)
            for _ in range(RUNNING)
        ]
        time.sleep(3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=12) == 0
        for reply in replies:
            assert reply.result().status_code == 200
            assert reply.result().json()["choices"][0]["finish_reason"] == "abort"
            assert reply.result().json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("api_servers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_outlives_a_server_that_is_killed(
    tmp_path: Path, api_servers: int
) -> None:
    server = Server(tmp_path, "--api-server-count", str(api_servers))
    started = server.processes()
    assert server.engine_core() in started
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(started, timeout=15)
    assert left == []


def test_a_killed_engine_is_an_unhealthy_server_that_exits_with_an_error(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    with server.client() as client:
        assert client.get("/health").status_code == 200
        server.engine_core().kill()

        def unhealthy() -> bool:
            try:
                return client.get("/health").status_code == 503
            except httpx.TransportError:
                return True

        wait_for(unhealthy, 10)
    assert server.process.wait(timeout=60) not in (0, -signal.SIGTERM, 143)
