# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics, in one process and in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.http.cache_report import BudgetReport, EngineReport
from kvserve.http.metrics import (
    BUDGET_COUNTERS,
    BUDGET_GAUGES,
    COUNTERS,
    GAUGES,
    POLICY_COUNTERS,
    POLICY_GAUGES,
    KVMetrics,
)

CACHE: dict[str, Any] = {
    "page_bytes": 8192,
    "pages_full": 100,
    "dense_prefill_pages": 4,
    "entries_seen": 3200,
    "entries_retained": [[400, 100], [200, 100]],
    "entries_evicted": 2400,
    "selection_seconds": 0.5,
    "compaction_seconds": 0.25,
    "requests": [
        {
            "request_id": "a",
            "prompt_tokens": 700,
            "tokens_seen": 800,
            "entries_retained": 800,
            "pages_held": 25,
            "dense_prefill": False,
            "policy": "retrieval",
        }
    ],
    "ended": None,
    "budgets": None,
}
PART: dict[str, Any] = {
    "pages_total": 1000,
    "pages_free": 975,
    "running": 1,
    "waiting": 2,
    "cache": CACHE,
}


def values(registry: CollectorRegistry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        sample.name: sample.value for family in families for sample in family.samples
    }


def test_every_metric_is_worked_out_from_the_report() -> None:
    registry = CollectorRegistry()
    KVMetrics("retrieval", "recent=480", "m", registry).update(
        EngineReport.merge([PART])
    )
    found = values(registry)
    expected = {
        "kvserve_policy_info": 1,
        "kvserve_pages_total": 1000,
        "kvserve_pages_held": 25,
        "kvserve_pages_free": 975,
        "kvserve_pages_spared": 0,
        "kvserve_kv_bytes_held": 25 * 8192,
        "kvserve_kv_bytes_full": 100 * 8192,
        "kvserve_kv_bytes_saved": 75 * 8192,
        "kvserve_compression_ratio": 4,
        "kvserve_retained_tokens": 800,
        "kvserve_seen_tokens": 3200,
        "kvserve_dense_prefill_pages": 4,
        "kvserve_evictions_total": 2400,
        "kvserve_selection_seconds_total": 0.5,
        "kvserve_compaction_seconds_total": 0.25,
    }
    assert {name: found[name] for name in expected} == expected
    assert set(expected) == {"kvserve_policy_info", *GAUGES, *COUNTERS}


def test_counters_count_on_from_report_to_report() -> None:
    registry = CollectorRegistry()
    metrics = KVMetrics("h2o", "", "m", registry)
    for evicted in (2400, 2400, 3000):
        part = {**PART, "cache": {**CACHE, "entries_evicted": evicted}}
        metrics.update(EngineReport.merge([part]))
    assert values(registry)["kvserve_evictions_total"] == 3000


def test_an_idle_server_has_a_ratio_of_one() -> None:
    idle = {**CACHE, "pages_full": 0, "requests": []}
    report = EngineReport.merge([{**PART, "pages_free": 1000, "cache": idle}])
    assert report.cache is not None
    assert report.cache.ratio == 1


def test_stock_vllm_has_only_the_name_of_its_policy() -> None:
    registry = CollectorRegistry()
    KVMetrics("none", "", "m", registry).update(
        EngineReport.merge([{**PART, "cache": None}])
    )
    assert list(values(registry)) == ["kvserve_policy_info"]


def test_engines_behind_one_server_are_added_up() -> None:
    report = EngineReport.merge([PART, PART])
    assert report.cache is not None
    assert report.cache.pages_held == 50
    assert report.cache.entries_retained == [[800, 200], [400, 200]]
    assert report.cache.entries_evicted == 4800
    assert report.cache.page_bytes == 8192
    assert len(report.cache.requests) == 2


def labelled(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, sample.labels["policy"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name in {*POLICY_GAUGES, *POLICY_COUNTERS}
    }


def test_where_policies_are_mixed_each_is_counted_by_its_name() -> None:
    registry = CollectorRegistry()
    metrics = KVMetrics("retrieval", "", "m", registry)
    total = {"requests": 2, "entries_seen": 90, "entries_retained": 60}
    first = {**CACHE, "ended": {"full": total}}
    metrics.update(EngineReport.merge([{**PART, "cache": first}]))
    found = labelled(registry)
    assert found["kvserve_policy_requests_running", "retrieval"] == 1
    assert found["kvserve_policy_pages_held", "retrieval"] == 25
    assert found["kvserve_policy_requests_running", "full"] == 0
    assert found["kvserve_policy_requests_ended_total", "full"] == 2
    assert found["kvserve_policy_requests_ended_total", "retrieval"] == 0
    idle = {**CACHE, "requests": [], "ended": {"full": {**total, "requests": 5}}}
    metrics.update(EngineReport.merge([{**PART, "cache": idle}]))
    found = labelled(registry)
    assert found["kvserve_policy_requests_running", "retrieval"] == 0
    assert found["kvserve_policy_pages_held", "retrieval"] == 0
    assert found["kvserve_policy_requests_ended_total", "full"] == 5
    assert found["kvserve_policy_entries_seen_total", "full"] == 90
    assert found["kvserve_policy_entries_retained_total", "full"] == 60


def test_where_they_are_not_there_are_no_metrics_of_policies() -> None:
    registry = CollectorRegistry()
    KVMetrics("retrieval", "", "m", registry).update(EngineReport.merge([PART]))
    assert labelled(registry) == {}


def test_policies_of_several_engines_are_added_up() -> None:
    total = {"requests": 2, "entries_seen": 90, "entries_retained": 60}
    parts = [
        {**PART, "cache": {**CACHE, "ended": {"full": total}}},
        {**PART, "cache": {**CACHE, "ended": {"full": total, "retrieval": total}}},
    ]
    report = EngineReport.merge(parts)
    assert report.cache is not None
    assert report.cache.by_policy["full"].requests_ended == 4
    assert report.cache.by_policy["full"].entries_seen == 180
    assert report.cache.by_policy["retrieval"].requests_running == 2
    assert report.cache.by_policy["retrieval"].requests_ended == 2
    assert report.smallest_pool == 1000


def by_budget(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, sample.labels["budget"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name in {*BUDGET_GAUGES, *BUDGET_COUNTERS}
    }


def test_where_there_is_a_range_requests_are_counted_by_budget() -> None:
    registry = CollectorRegistry()
    metrics = KVMetrics("kvzap", "", "m", registry, budgets=["50%", "12.5%"])
    for begun in ((3, 1), (4, 9)):
        budgets = [{"running": 2, "begun": begun[0]}, {"running": 0, "begun": begun[1]}]
        part = {**PART, "cache": {**CACHE, "budgets": budgets}}
        metrics.update(EngineReport.merge([part]))
    assert by_budget(registry) == {
        ("kvserve_budget_requests_running", "50%"): 2,
        ("kvserve_budget_requests_running", "12.5%"): 0,
        ("kvserve_budget_requests_begun_total", "50%"): 4,
        ("kvserve_budget_requests_begun_total", "12.5%"): 9,
    }


def test_without_a_range_there_are_no_metrics_of_budgets() -> None:
    registry = CollectorRegistry()
    KVMetrics("retrieval", "", "m", registry).update(EngineReport.merge([PART]))
    assert by_budget(registry) == {}


def test_budgets_of_several_engines_are_added_up() -> None:
    parts = [
        {**PART, "cache": {**CACHE, "budgets": [{"running": 1, "begun": 5}] * 2}}
        for _ in range(2)
    ]
    report = EngineReport.merge(parts)
    assert report.cache is not None
    assert report.cache.budgets == [BudgetReport(running=2, begun=10)] * 2


_WRITER = """
import sys
from kvserve.http.metrics import KVMetrics
from kvserve.http.cache_report import EngineReport
from tests.unit.http.test_metrics import PART
if sys.argv[1] == "first":
    metrics = KVMetrics("retrieval", "", "m")
    metrics.update(EngineReport.merge([PART]))
    metrics.update(EngineReport.merge([PART]))
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_metrics_are_the_same_however_many_processes_answer(
    tmp_path: Path, processes: int
) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for kind in ["first", "other", "other"][:processes]:
        subprocess.run(
            [sys.executable, "-c", _WRITER, kind], env=environment, check=True
        )
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    found = values(registry)
    assert found["kvserve_evictions_total"] == 2400
    assert found["kvserve_pages_held"] == 25
    assert found["kvserve_policy_info"] == 1
