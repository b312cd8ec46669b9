# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus, with the configuration that is deployed, on a port of its own."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvserve.bench.server import free_port
from tests.deploy.conftest import DEPLOY, find_tool, load_yaml
from tests.engine.servers import wait_until_answered

_FOLDER = DEPLOY / "prometheus"
_START_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs at ``url``."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """Call the API; an error of Prometheus' is an error here."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}") as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str, start: float, end: float) -> list[float]:
        """Every number that a query gives between two times; NaN is no number."""
        data = self.ask("query_range", query=query, start=start, end=end, step=1)
        values = (float(v) for curve in data["result"] for _, v in curve["values"])
        return [value for value in values if math.isfinite(value)]

    def wait_for(self, query: str, seconds: float = 30) -> None:
        """Wait until a query gives something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.ask("query", query=query)["result"]:
                return
            time.sleep(0.5)
        raise AssertionError(f"{query} gave nothing for {seconds} s")


@contextlib.contextmanager
def running_prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Scrape ``target`` (host:port) every second with what deploy/prometheus/ says."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        find_tool("prometheus"),
        f"--config.file={_configure(target, folder)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_answered(f"http://{address}/-/ready", process, log, _START_SECONDS)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=30)


def _configure(target: str, folder: Path) -> Path:
    """The deployed configuration, faster, and with another target."""
    config = load_yaml(_FOLDER / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(_FOLDER / pattern) for pattern in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path
