# SPDX-License-Identifier: Apache-2.0
"""Asks the engine how it does, once for all who want to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvserve.http.cache_report import EngineReport
from kvserve.http.metrics import KVMetrics

PERIOD_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0

Ask = Callable[[str], Awaitable[list[Any]]]
"""Makes a call to every engine and returns their answers."""


class EngineSilentError(Exception):
    """The engine gave no answer: it is gone, stopping, or in a very long step."""


@dataclass(frozen=True)
class Sample:
    """A report, when it was made, and what changed since the one before."""

    time: float
    report: EngineReport
    evictions_per_second: float


class Sampler:
    """Shares reports: an engine is asked once a second at most.

    Args:
        ask: makes a call to every engine.
        is_stopping: tells when engines are not to be asked any more.

    Attributes:
        metrics: to bring up to date with every report; only in one process.
    """

    def __init__(self, ask: Ask, is_stopping: Callable[[], bool]) -> None:
        self._ask, self._is_stopping = ask, is_stopping
        self.metrics: KVMetrics | None = None
        self._latest: Sample | None = None
        self._pending: asyncio.Task[Sample] | None = None

    async def sample(self, patience: float = _PATIENCE_SECONDS) -> Sample:
        """Return a report at most a second old, or the latest if none comes in time.

        Raises:
            EngineSilentError: there is none at all.
        """
        if self._is_fresh() and self._latest is not None:
            return self._latest
        if self._pending is None or self._pending.done():
            self._pending = asyncio.create_task(self._fetch())
            # Nobody may be waiting any more when it fails.
            self._pending.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )
        try:
            return await asyncio.wait_for(asyncio.shield(self._pending), patience)
        except TimeoutError:
            if self._latest is None:
                raise EngineSilentError from None
        except EngineSilentError:
            if self._latest is None or not self._is_stopping():
                raise
        return self._latest

    async def receipts(self) -> list[Mapping[str, Any]] | None:
        """Return receipts of all engines, the last to end first.

        ``None`` means that there is no policy.

        Raises:
            EngineSilentError: no answer.
        """
        parts = await self._call("kvserve_receipts")
        if parts[0] is None:
            return None
        found = [receipt for part in parts for receipt in part]
        return sorted(found, key=lambda one: -one["finished"])

    async def faults(self) -> list[str] | None:
        """Let every engine check its pool, lists and index; return what is wrong.

        ``None`` means that there is no policy.

        Raises:
            EngineSilentError: no answer.
        """
        parts = await self._call("kvserve_integrity")
        if parts[0] is None:
            return None
        if len(parts) == 1:
            return list(parts[0])
        return [
            f"engine {number}: {fault}"
            for number, part in enumerate(parts)
            for fault in part
        ]

    async def keep_metrics(self) -> None:
        """Sample once a second till the server stops."""
        while not self._is_stopping():
            with suppress(EngineSilentError):
                await self.sample()
            await asyncio.sleep(PERIOD_SECONDS)

    def _is_fresh(self) -> bool:
        if self._latest is None:
            return False
        return time.time() - self._latest.time < PERIOD_SECONDS / 2

    async def _fetch(self) -> Sample:
        report = EngineReport.merge(await self._call("kvserve_report"))
        now, before, rate = time.time(), self._latest, 0.0
        if before and before.report.cache and report.cache:
            evicted = report.cache.entries_evicted
            evicted -= before.report.cache.entries_evicted
            rate = evicted / max(now - before.time, 1e-3)
        self._latest = Sample(now, report, rate)
        if self.metrics is not None:
            self.metrics.update(report)
        return self._latest

    async def _call(self, method: str) -> list[Any]:
        if self._is_stopping():
            raise EngineSilentError
        try:
            return await asyncio.wait_for(self._ask(method), _PATIENCE_SECONDS)
        except Exception as error:
            # vLLM has several exceptions for engines that are gone or stopping.
            raise EngineSilentError from error
