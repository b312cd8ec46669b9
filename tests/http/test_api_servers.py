# SPDX-License-Identifier: Apache-2.0
"""Several API processes before one engine: numbers are counted once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.http.metrics import COUNTERS, GAUGES
from tests.http.harness import Server, completion

pytestmark = pytest.mark.engine

PROMPT = "The tide came in slowly over the flats and the boats began to lift. " * 45


def metrics_of(server: Server) -> dict[str, float]:
    """Scrape over a connection of its own, which any of the processes may take."""
    with server.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.name in GAUGES or sample.name in COUNTERS
    }


def test_metrics_are_the_engines_whichever_process_answers(tmp_path: Path) -> None:
    server = Server(tmp_path, "--api-server-count", "2")
    for _ in range(4):
        with server.client() as client:
            client.post("/v1/completions", json=completion(PROMPT, 4))
    time.sleep(3)  # metrics are brought up to date once a second
    with server.client() as client:
        receipts = client.get("/v1/kv/receipts").json()["data"]
        pages = client.get("/v1/kv/stats").json()["cache"]["pages"]
    scrapes = [metrics_of(server) for _ in range(8)]
    assert server.stop() is not None
    assert all(scrape == scrapes[0] for scrape in scrapes)
    assert set(scrapes[0]) == {*GAUGES, *COUNTERS}
    assert len(receipts) == 4
    evicted = sum(receipt["entries_evicted"] for receipt in receipts)
    assert scrapes[0]["kvserve_evictions_total"] == evicted > 0
    assert scrapes[0]["kvserve_pages_total"] == pages["total"]
