# SPDX-License-Identifier: Apache-2.0
"""The ``kvserve_*`` metrics of Prometheus.

One API process of a server keeps them, the first. Where several answer, vLLM switches
to Prometheus' multiprocess mode, in which counters of all processes are added up: two
writers would count everything twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from kvserve.http.cache_report import BudgetReport, EngineReport, PolicyReport

# By name: the help text, and where a report has the value.
GAUGES: dict[str, tuple[str, str]] = {
    "kvserve_pages_total": (
        "Head pages of the KV pool that requests can have, scratch not counted.",
        "pages_total",
    ),
    "kvserve_pages_held": (
        "Head pages that requests hold.",
        "pages_held",
    ),
    "kvserve_pages_free": (
        "Head pages that are free.",
        "pages_free",
    ),
    "kvserve_pages_spared": (
        "Head pages that would be held besides if requests shared no prefixes.",
        "pages_spared",
    ),
    "kvserve_kv_bytes_held": (
        "Bytes of the KV pages that requests hold.",
        "bytes_held",
    ),
    "kvserve_kv_bytes_full": (
        "Bytes that a cache that evicts nothing would hold for the same requests.",
        "bytes_full",
    ),
    "kvserve_kv_bytes_saved": (
        "Bytes of kvserve_kv_bytes_full that are not held.",
        "bytes_saved",
    ),
    "kvserve_compression_ratio": (
        "kvserve_kv_bytes_full over kvserve_kv_bytes_held, 1 when nothing runs.",
        "ratio",
    ),
    "kvserve_retained_tokens": (
        "KV entries (token x KV head x layer) retained of running requests.",
        "retained",
    ),
    "kvserve_seen_tokens": (
        "KV entries (token x KV head x layer) that running requests have produced.",
        "entries_seen",
    ),
    "kvserve_dense_prefill_pages": (
        "Head pages of requests that hold a full cache till their prompt is read.",
        "dense_prefill_pages",
    ),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "kvserve_evictions_total": (
        "KV entries (token x KV head x layer) evicted since the start.",
        "entries_evicted",
    ),
    "kvserve_selection_seconds_total": (
        "Seconds that workers spent on choosing what survives.",
        "selection_seconds",
    ),
    "kvserve_compaction_seconds_total": (
        "Seconds that workers spent on moving what survives.",
        "compaction_seconds",
    ),
}

# The same, of each policy: there only where a request may name one of its own.
POLICY_GAUGES: dict[str, tuple[str, str]] = {
    "kvserve_policy_requests_running": (
        "Requests of the policy that hold pages.",
        "requests_running",
    ),
    "kvserve_policy_pages_held": (
        "Head pages that requests of the policy hold.",
        "pages_held",
    ),
}
POLICY_COUNTERS: dict[str, tuple[str, str]] = {
    "kvserve_policy_requests_ended_total": (
        "Requests of the policy that ended.",
        "requests_ended",
    ),
    "kvserve_policy_entries_seen_total": (
        "KV entries (token x KV head x layer) that they had produced.",
        "entries_seen",
    ),
    "kvserve_policy_entries_retained_total": (
        "KV entries that they had retained when they ended.",
        "entries_retained",
    ),
}


# Of each budget of a range: there only where a server has one.
BUDGET_GAUGES: dict[str, tuple[str, str]] = {
    "kvserve_budget_requests_running": (
        "Requests with the budget that hold pages.",
        "running",
    ),
}
BUDGET_COUNTERS: dict[str, tuple[str, str]] = {
    "kvserve_budget_requests_begun_total": (
        "Requests that began with the budget.",
        "begun",
    ),
}


class KVMetrics:
    """Keeps the metrics of a server.

    Args:
        policy, arguments, model: labels of ``kvserve_policy_info``.
        registry: where to register; the default is what ``/metrics`` serves.
        budgets: names of the budgets of a range, the largest first.
    """

    def __init__(
        self,
        policy: str,
        arguments: str,
        model: str,
        registry: CollectorRegistry = REGISTRY,
        budgets: Sequence[str] = (),
    ) -> None:
        self._registry, self._budgets = registry, budgets
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted = dict.fromkeys(COUNTERS, 0.0)
        self._policies: set[str] = set()
        info = Gauge(
            "kvserve_policy_info",
            "The cache policy, its arguments and the model; always 1.",
            ["policy", "arguments", "model"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        info.labels(policy, arguments, model).set(1)

    def update(self, report: EngineReport) -> None:
        """Take over the numbers of a report; without a policy there are none."""
        cache = report.cache
        if cache is None:
            return
        if not self._gauges:
            self._register()
        for name, (_, attribute) in GAUGES.items():
            self._gauges[name].set(getattr(cache, attribute))
        for name, (_, attribute) in COUNTERS.items():
            now = float(getattr(cache, attribute))
            self._counters[name].inc(max(now - self._counted[name], 0))
            self._counted[name] = now
        if cache.ended is not None:
            reports = cache.by_policy
            self._update_labelled("policy", reports, POLICY_GAUGES, POLICY_COUNTERS)
            for name in POLICY_GAUGES:
                for policy in self._policies - set(reports):
                    self._gauges[name].labels(policy).set(0)
            self._policies.update(reports)
        if cache.budgets is not None:
            budgets = dict(zip(self._budgets, cache.budgets, strict=True))
            self._update_labelled("budget", budgets, BUDGET_GAUGES, BUDGET_COUNTERS)

    def _update_labelled(
        self,
        label: str,
        reports: Mapping[str, PolicyReport] | Mapping[str, BudgetReport],
        gauges: Mapping[str, tuple[str, str]],
        counters: Mapping[str, tuple[str, str]],
    ) -> None:
        """Take over reports by the value of a label."""
        for name, (text, attribute) in gauges.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, text, [label])
            for value, report in reports.items():
                self._gauges[name].labels(value).set(getattr(report, attribute))
        for name, (text, attribute) in counters.items():
            if name not in self._counters:
                self._counters[name] = Counter(
                    name, text, [label], registry=self._registry
                )
            for value, report in reports.items():
                key, now = f"{name} {value}", float(getattr(report, attribute))
                before = self._counted.get(key, 0.0)
                self._counters[name].labels(value).inc(max(now - before, 0))
                self._counted[key] = now

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(
            name, text, labels, registry=self._registry, multiprocess_mode="mostrecent"
        )

    def _register(self) -> None:
        for name, (text, _) in GAUGES.items():
            self._gauges[name] = self._gauge(name, text)
        for name, (text, _) in COUNTERS.items():
            self._counters[name] = Counter(name, text, registry=self._registry)
