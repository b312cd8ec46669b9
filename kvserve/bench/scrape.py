# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself while it is under load: its ``/metrics``, sampled."""

from __future__ import annotations

import os
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm  # type: ignore[import-untyped]

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_PREEMPTIONS = "vllm:num_preemptions_total"
_QUERIES = "vllm:prefix_cache_queries_total"
_HITS = "vllm:prefix_cache_hits_total"
_SECONDS_BETWEEN = 0.25


@dataclass(frozen=True)
class Sample:
    """One look at the server, ``seconds`` after the first.

    Attributes:
        usage: share of the KV cache that is held, 0 to 1.
        preemptions: since the server started.
        prefix_queries: prompt tokens that were looked up in the prefix cache since.
        prefix_hits: those that were found.
    """

    seconds: float
    running: float
    waiting: float
    usage: float
    preemptions: float
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0


def get(url: str, timeout: float = 10) -> str:
    """GET ``url`` as text, with the key in ``OPENAI_API_KEY`` if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        body: bytes = response.read()
    return body.decode()


def read_sample(text: str, seconds: float) -> Sample:
    """Read one scrape; engines of one server are added up, usage is the fullest's."""
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, []).append(sample.value)
    missing = {_RUNNING, _WAITING, _USAGE, _PREEMPTIONS} - values.keys()
    if missing:
        raise KeyError(", ".join(sorted(missing)))
    return Sample(
        seconds,
        sum(values[_RUNNING]),
        sum(values[_WAITING]),
        max(values[_USAGE]),
        sum(values[_PREEMPTIONS]),
        sum(values.get(_QUERIES, [])),
        sum(values.get(_HITS, [])),
    )


class Sampler:
    """Samples a server from a thread of its own, between ``with`` and its end.

    The first and the last sample are taken at the edges, so that a difference of
    counters covers everything in between.
    """

    def __init__(self, base_url: str) -> None:
        self.samples: list[Sample] = []
        self._url = f"{base_url}/metrics"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._start = time.perf_counter()
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._take()

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN):
            try:
                self._take()
            except OSError as error:
                # Said, not raised: the load goes on, and peaks may be missed.
                tqdm.write(f"kvserve: {self._url}: {error}", file=sys.stderr)

    def _take(self) -> None:
        text = get(self._url)
        self.samples.append(read_sample(text, time.perf_counter() - self._start))
