# SPDX-License-Identifier: Apache-2.0
"""One server for all tests that leave it alive."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.http.harness import KEY, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--receipt-header", key=KEY)
    yield server
    with server.client() as client:
        found = client.get("/v1/kv/stats", params={"check": 1}).json()
    assert found["integrity"] == {"sound": True, "faults": []}
    assert server.stop() in (0, -signal.SIGTERM, 143)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
