# SPDX-License-Identifier: Apache-2.0
"""Mixed load for a while: no failure, no leak, and every answer right."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.http.harness import BODY_LIMIT, Server, completion

pytestmark = pytest.mark.engine

CONCURRENCY = 16
WORDS = (
    "the tide came in over flats and boats that had lain on their sides began to lift"
)
PROMPTS = [f"{WORDS} {n}. " * n for n in (1, 3, 8, 20, 40)]
TOKENS = 8
LONG = 2000
MALFORMED: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"model": 1}',
    b'{"prompt": "a", "max_tokens": "many"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "logprobs": 1000}',
    b'{"prompt": [99999999]}',
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
]


class Load:
    """Sends one kind of request or another, and notes what came."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self._server, self._client = server, client
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.answers = {prompt: self._answer(prompt) for prompt in PROMPTS}

    def send(self, seed: int) -> None:
        source = random.Random(seed)
        kinds: dict[Callable[[random.Random], int], int] = {
            self._whole: 5,
            self._streamed: 3,
            self._slow: 1,
            self._aborted: 3,
            self._malformed: 2,
            self._oversized: 1,
        }
        (kind,) = source.choices(list(kinds), weights=list(kinds.values()))
        self.statuses[kind.__name__, kind(source)] += 1

    def _answer(self, prompt: str) -> str:
        reply = self._client.post("/v1/completions", json=completion(prompt, TOKENS))
        text: str = reply.json()["choices"][0]["text"]
        return text

    def _whole(self, source: random.Random) -> int:
        prompt = source.choice(PROMPTS)
        reply = self._client.post("/v1/completions", json=completion(prompt, TOKENS))
        assert reply.json()["choices"][0]["text"] == self.answers[prompt]
        return reply.status_code

    def _streamed(self, source: random.Random, pause: float = 0) -> int:
        prompt = source.choice(PROMPTS)
        with self._stream(completion(prompt, TOKENS, stream=True)) as reply:
            lines = []
            for line in reply.iter_lines():
                lines.append(line)
                time.sleep(pause)
        chunks = [
            httpx.Response(200, content=line.removeprefix("data: ")).json()
            for line in lines
            if line.startswith("data: {")
        ]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == self.answers[prompt]
        return reply.status_code

    def _slow(self, source: random.Random) -> int:
        return self._streamed(source, pause=0.1)

    def _aborted(self, source: random.Random) -> int:
        body = completion(source.choice(PROMPTS), 500, stream=True)
        patience = source.choice([0.05, 0.3, 1.0])
        with self._server.client(timeout=httpx.Timeout(60, read=patience)) as client:
            try:
                with client.stream("POST", "/v1/completions", json=body) as reply:
                    for _ in zip(reply.iter_lines(), range(6), strict=False):
                        pass
                    return reply.status_code
            except httpx.ReadTimeout:
                return 200

    def _malformed(self, source: random.Random) -> int:
        path = source.choice(["/v1/completions", "/v1/chat/completions"])
        headers = {"Content-Type": "application/json"}
        content = source.choice(MALFORMED)
        reply = self._client.post(path, content=content, headers=headers)
        assert reply.json()["error"]["message"]
        return reply.status_code

    def _oversized(self, source: random.Random) -> int:
        content: bytes | Iterator[bytes] = b"a" * (BODY_LIMIT + 1)
        if source.random() < 0.5:
            content = iter([b"a" * (BODY_LIMIT // 8)] * 9)
        try:
            return self._client.post("/v1/completions", content=content).status_code
        except httpx.WriteError:
            return 413  # the server hung up before it had read all

    def _stream(self, body: dict[str, Any]) -> Any:
        return self._client.stream("POST", "/v1/completions", json=body)


def memory_of(server: Server) -> Counter[str]:
    """MiB of each process, by name."""
    return Counter(
        {
            f"{process.name()} {process.pid}": process.memory_info().rss >> 20
            for process in server.processes()
        }
    )


def idle(client: httpx.Client) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats: dict[str, Any] = client.get("/v1/kv/stats").json()
        if stats["running"] == stats["waiting"] == 0:
            return stats
        time.sleep(0.3)
    raise AssertionError("requests still run")


@pytest.mark.parametrize("requests", [72, pytest.param(LONG, marks=pytest.mark.slow)])
def test_mixed_load_leaves_the_server_as_it_was(
    server: Server, client: httpx.Client, requests: int
) -> None:
    with server.client(limits=httpx.Limits(max_connections=CONCURRENCY)) as one:
        load = Load(server, one)
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            half = requests // 2
            list(pool.map(load.send, range(half)))
            idle(client)
            before = memory_of(server)
            list(pool.map(load.send, range(half, requests)))
    stats = idle(client)
    grown = memory_of(server) - before
    if requests < LONG:
        # Kernels and the allocator warm up for some 500 requests, in the engine alone.
        grown = Counter({n: mib for n, mib in grown.items() if "EngineCore" not in n})
    assert grown.total() < 64, grown
    assert stats["cache"]["pages"]["held"] == 0
    assert stats["cache"]["pages"]["free"] == stats["cache"]["pages"]["total"]
    assert sum(load.statuses.values()) == requests
    kinds: dict[str, set[int]] = {}
    for kind, status in load.statuses:
        kinds.setdefault(kind, set()).add(status)
    assert kinds == {
        "_whole": {200},
        "_streamed": {200},
        "_slow": {200},
        "_aborted": {200},
        "_malformed": {400},
        "_oversized": {413},
    }
    assert client.get("/health").status_code == 200
