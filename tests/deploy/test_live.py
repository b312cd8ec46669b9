# SPDX-License-Identifier: Apache-2.0
"""A real kvserve under load, scraped by a real Prometheus: nothing shown is empty."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvserve.bench.server import running_server
from kvserve.errors import UserError
from tests.deploy.conftest import find_tool
from tests.deploy.observed import Prometheus, running_prometheus
from tests.deploy.test_grafana import queries
from tests.deploy.test_prometheus import rules

pytestmark = pytest.mark.engine

_SERVER = (
    *("--policy", "retrieval", "--kv-cache-memory-bytes", "128M"),
    *("--max-model-len", "2048", "--enforce-eager"),
)
_LOAD = (
    *("--workload", "long-document", "--requests", "6"),
    *("--prompt-tokens", "640", "--output-tokens", "32"),
    # A machine of any speed reads two prompts before "first tokens are slow" is true.
    *("--concurrency", "2"),
)
_METRIC = re.compile(r"\b(?:vllm:|kvserve_|job:|instance:)[\w:]+|\bup\b")


@dataclass(frozen=True)
class Observed:
    """A load that is over, and a Prometheus that watched it."""

    prometheus: Prometheus
    start: float
    end: float
    report: str
    results: dict[str, Any]

    def values(self, query: str) -> list[float]:
        return self.prometheus.values(query, self.start, self.end)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Start a server and Prometheus, put the one under load, watch with the other."""
    find_tool("prometheus")
    folder = tmp_path_factory.mktemp("live")
    with running_server(_SERVER, folder / "server.log") as url:
        target = url.removeprefix("http://")
        with running_prometheus(target, folder) as prometheus:
            prometheus.wait_for("up == 1")
            start = time.time()
            report, results = _bench(url, folder)
            # One more scrape, and one more evaluation of the rules.
            time.sleep(3)
            yield Observed(prometheus, start, time.time(), report, results)


def _bench(url: str, folder: Path) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", "kvserve.cli", "bench", "--url", url, *_LOAD]
    command += ["--json", folder / "bench.json", "--image", folder / "bench.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout, json.loads((folder / "bench.json").read_text())


@pytest.mark.parametrize("name", queries())
def test_every_query_of_the_dashboard_gives_numbers(
    observed: Observed, name: str
) -> None:
    assert observed.values(queries()[name]), queries()[name]


@pytest.mark.parametrize(
    "name", [rule["record"] for rule in rules() if "record" in rule]
)
def test_every_recording_rule_records(observed: Observed, name: str) -> None:
    assert observed.values(name)


@pytest.mark.parametrize("rule", rules(), ids=lambda r: r.get("alert") or r["record"])
def test_every_metric_that_a_rule_speaks_of_exists(
    observed: Observed, rule: dict[str, str]
) -> None:
    names = set(_METRIC.findall(rule["expr"]))
    assert names
    known = set(observed.prometheus.ask("label/__name__/values"))
    assert names <= known


def test_prometheus_reads_the_rules_without_an_error(observed: Observed) -> None:
    groups = observed.prometheus.ask("rules")["groups"]
    states = {rule["name"]: rule["health"] for g in groups for rule in g["rules"]}
    assert len(states) == len(rules())
    assert set(states.values()) == {"ok"}


def test_a_healthy_server_raises_no_alert(observed: Observed) -> None:
    assert observed.prometheus.ask("alerts")["alerts"] == []


def test_bench_measures_what_prometheus_saw(observed: Observed) -> None:
    (run,) = observed.results["runs"]
    assert run["completed"] == 6
    assert run["failed"] == 0
    # The warm-up is in Prometheus' counter only: eight tokens, before the load.
    generated = max(observed.values("vllm:generation_tokens_total"))
    assert generated == run["output_tokens"] + 8
    assert 150 <= run["output_tokens"] <= 240
    assert 0 < run["peak_kv_usage"] <= 1
    assert run["most_running"] > 1
    assert 0 < run["ttft"]["p50"] <= run["ttft"]["p99"]
    assert 0 < run["itl"]["p50"] <= run["itl"]["p99"]
    assert "| output tok/s |" in observed.report


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no-such-policy"),
        running_server(["--policy", "no-such-policy"], tmp_path / "log"),
    ):
        pass


def test_a_bench_that_is_terminated_takes_its_server_with_it() -> None:
    command = [sys.executable, "-m", "kvserve.cli", "bench", "--compare", "full"]
    bench = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    deadline = time.monotonic() + 60
    while not (pids := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The server's own start must not be in the way of its end.
    bench.terminate()
    assert bench.wait(timeout=90) == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
