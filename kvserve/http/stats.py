# SPDX-License-Identifier: Apache-2.0
"""From a sample to the body of ``/v1/kv/stats``."""

from __future__ import annotations

import dataclasses

from kvserve.http.cache_report import CacheReport
from kvserve.http.gateway import Gateway
from kvserve.http.models import (
    BudgetUse,
    Bytes,
    Cache,
    Integrity,
    Pages,
    Running,
    Stats,
)
from kvserve.http.sampler import Sample
from kvserve.http.traffic import read_traffic


def stats_of(
    gateway: Gateway, sample: Sample, faults: list[str] | None = None
) -> Stats:
    """Say how the server does.

    Args:
        faults: what a check of the engines found, if they were asked for one.
    """
    report = sample.report
    cache = report.cache
    names = gateway.policy.budgets if gateway.policy else []
    return Stats(
        time=sample.time,
        policy=gateway.policy.name if gateway.policy else "none",
        running=report.running,
        waiting=report.waiting,
        draining=gateway.draining,
        cache=_cache(cache, sample.evictions_per_second, names) if cache else None,
        traffic=read_traffic(),
        integrity=_integrity(faults),
    )


def _integrity(faults: list[str] | None) -> Integrity | None:
    return None if faults is None else Integrity(sound=not faults, faults=faults)


def _budgets(report: CacheReport, names: list[str]) -> list[BudgetUse] | None:
    if report.budgets is None:
        return None
    known = zip(names, report.budgets, strict=True)
    return [BudgetUse(budget=n, **dataclasses.asdict(one)) for n, one in known]


def _cache(report: CacheReport, evictions_per_second: float, names: list[str]) -> Cache:
    return Cache(
        pages=Pages(
            total=report.pages_total,
            held=report.pages_held,
            free=report.pages_free,
            dense_prefill=report.dense_prefill_pages,
            spared=report.pages_spared,
        ),
        bytes=Bytes(
            held=report.bytes_held, full=report.bytes_full, saved=report.bytes_saved
        ),
        compression_ratio=report.ratio,
        entries_seen=report.entries_seen,
        entries_retained=report.retained,
        retained_by_head=report.entries_retained,
        entries_evicted=report.entries_evicted,
        evictions_per_second=evictions_per_second,
        selection_seconds=report.selection_seconds,
        compaction_seconds=report.compaction_seconds,
        requests=[Running(**dataclasses.asdict(one)) for one in report.requests],
        budgets=_budgets(report, names),
    )
