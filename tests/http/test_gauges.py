# SPDX-License-Identifier: Apache-2.0
"""Gauges come back to nothing when all clients have left, without another request."""

from __future__ import annotations

import time
from contextlib import ExitStack

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.http.metrics import GAUGES
from tests.http.harness import Server, completion

pytestmark = pytest.mark.engine

_LEFT_AT_ONCE = 6
_SECONDS = 2.0
# What is not nothing on an idle server.
_AT_REST = ("kvserve_pages_total", "kvserve_pages_free", "kvserve_compression_ratio")
_NOTHING = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    *(name for name in GAUGES if name not in _AT_REST),
)


def _busy(client: httpx.Client) -> dict[str, float]:
    """Gauges that are not at nothing."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    assert {sample.name for sample in samples} >= set(_NOTHING)
    return {
        sample.name: sample.value
        for sample in samples
        if sample.name in _NOTHING and sample.value
    }


def _leave_at_once(server: Server) -> None:
    with server.client() as client:
        with ExitStack() as streams:
            for at in range(_LEFT_AT_ONCE):
                # A connection for each, so that it ends with its request.
                own = streams.enter_context(server.client())
                body = completion(f"Tell me {at} stories.", 1500, stream=True)
                request = own.stream("POST", "/v1/completions", json=body)
                assert streams.enter_context(request).status_code == 200
            deadline = time.monotonic() + 30
            while len(_busy(client)) < 4 and time.monotonic() < deadline:
                time.sleep(0.2)
            found = _busy(client)
            assert found["vllm:num_requests_running"] >= 1
            assert found["kvserve_pages_held"] >= 1
        left = time.monotonic()
        while (found := _busy(client)) and time.monotonic() < left + _SECONDS:
            time.sleep(0.1)
    assert not found


def test_all_clients_leave_in_the_middle_of_their_streams(server: Server) -> None:
    _leave_at_once(server)
