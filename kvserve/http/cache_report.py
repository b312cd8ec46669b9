# SPDX-License-Identifier: Apache-2.0
"""What engines report of their caches, merged over engines.

An *entry* is what one KV head of one layer keeps of one token. "Full" is what a cache
that evicts nothing would hold for the same requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_SUMMED = (
    "pages_full",
    "dense_prefill_pages",
    "entries_seen",
    "entries_evicted",
    "selection_seconds",
    "compaction_seconds",
)


@dataclass(frozen=True)
class RequestReport:
    """What one running request holds; ``dense_prefill``: a full cache, for now."""

    request_id: str
    prompt_tokens: int
    tokens_seen: int
    entries_retained: int
    pages_held: int
    dense_prefill: bool
    policy: str


@dataclass(frozen=True)
class PolicyReport:
    """What requests of one policy hold, and what those that ended had seen and kept."""

    requests_running: int
    pages_held: int
    requests_ended: int
    entries_seen: int
    entries_retained: int


@dataclass(frozen=True)
class BudgetReport:
    """Requests with one budget of a range: that hold pages, and that ever began."""

    running: int
    begun: int


@dataclass(frozen=True)
class CacheReport:
    """What running requests hold under a policy.

    Attributes:
        pages_total: pages that requests can have.
        pages_held: pages that they hold.
        page_bytes: bytes of one page.
        pages_full: pages that a cache that evicts nothing would hold.
        dense_prefill_pages: pages of requests that hold a full cache for now.
        entries_seen: entries that a cache that evicts nothing would hold.
        entries_retained: entries held, ``[num_layers][num_kv_heads]``.
        entries_evicted: since the engine started.
        selection_seconds: spent on choosing what survives since the start.
        compaction_seconds: spent on moving it.
        ended: totals of requests that ended, by policy; ``None`` where all have one.
        budgets: of a range, the largest first; ``None`` where there is one budget.
    """

    pages_total: int
    pages_held: int
    page_bytes: int
    pages_full: int
    dense_prefill_pages: int
    entries_seen: int
    entries_retained: list[list[int]]
    entries_evicted: int
    selection_seconds: float
    compaction_seconds: float
    requests: list[RequestReport]
    ended: dict[str, dict[str, int]] | None
    budgets: list[BudgetReport] | None

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, Any]]) -> CacheReport:
        """Add up what engines with copies of one model report."""
        caches = [part["cache"] for part in parts]
        entries = np.sum([cache["entries_retained"] for cache in caches], axis=0)
        rows = [row for cache in caches for row in cache["requests"]]
        return cls(
            pages_total=sum(part["pages_total"] for part in parts),
            pages_held=sum(part["pages_total"] - part["pages_free"] for part in parts),
            page_bytes=caches[0]["page_bytes"],
            entries_retained=entries.tolist(),
            requests=[RequestReport(**row) for row in rows],
            ended=_add_up([cache["ended"] for cache in caches]),
            budgets=_of_budgets([cache["budgets"] for cache in caches]),
            **{name: sum(cache[name] for cache in caches) for name in _SUMMED},
        )

    @property
    def pages_free(self) -> int:
        return self.pages_total - self.pages_held

    @property
    def pages_spared(self) -> int:
        """What requests would hold besides if each had pages of its own."""
        return sum(one.pages_held for one in self.requests) - self.pages_held

    @property
    def bytes_held(self) -> int:
        return self.pages_held * self.page_bytes

    @property
    def bytes_full(self) -> int:
        return self.pages_full * self.page_bytes

    @property
    def bytes_saved(self) -> int:
        return self.bytes_full - self.bytes_held

    @property
    def ratio(self) -> float:
        """Full over held; 1 when nothing runs."""
        return self.pages_full / self.pages_held if self.pages_held else 1.0

    @cached_property
    def by_policy(self) -> dict[str, PolicyReport]:
        """What requests of each policy hold and held, where policies are mixed."""
        if self.ended is None:
            return {}
        pages: dict[str, list[int]] = {name: [] for name in self.ended}
        for one in self.requests:
            pages.setdefault(one.policy, []).append(one.pages_held)
        return {
            name: _policy_report(held, self.ended.get(name, {}))
            for name, held in pages.items()
        }

    @cached_property
    def retained(self) -> int:
        """Entries held over all layers and heads."""
        return sum(map(sum, self.entries_retained))


def _policy_report(held: list[int], ended: Mapping[str, int]) -> PolicyReport:
    return PolicyReport(
        requests_running=len(held),
        pages_held=sum(held),
        requests_ended=ended.get("requests", 0),
        entries_seen=ended.get("entries_seen", 0),
        entries_retained=ended.get("entries_retained", 0),
    )


def _of_budgets(
    parts: Sequence[Sequence[Mapping[str, int]] | None],
) -> list[BudgetReport] | None:
    """Add up what several engines with the same range say of each budget."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return [
        BudgetReport(
            sum(one["running"] for one in same), sum(one["begun"] for one in same)
        )
        for same in zip(*known, strict=True)
    ]


def _add_up(
    parts: Sequence[Mapping[str, Mapping[str, int]] | None],
) -> dict[str, dict[str, int]] | None:
    """Add the totals of several engines up, policy by policy."""
    totals: dict[str, dict[str, int]] = {}
    for part in parts:
        if part is None:
            return None
        for policy, ended in part.items():
            before = totals.get(policy, {})
            totals[policy] = {k: v + before.get(k, 0) for k, v in ended.items()}
    return totals


@dataclass(frozen=True)
class EngineReport:
    """The load, and what it holds; ``cache`` is ``None`` for stock vLLM.

    ``smallest_pool``: pages of the engine that has fewest.
    """

    running: int
    waiting: int
    cache: CacheReport | None
    smallest_pool: int

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, Any]]) -> EngineReport:
        """Add up the reports of all engines behind one server."""
        return cls(
            running=sum(part["running"] for part in parts),
            waiting=sum(part["waiting"] for part in parts),
            cache=CacheReport.merge(parts) if parts[0]["cache"] else None,
            smallest_pool=min(part["pages_total"] for part in parts),
        )
