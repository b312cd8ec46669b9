# SPDX-License-Identifier: Apache-2.0
"""Three calls that vLLM's engine core answers for the HTTP routes.

They run between steps, in the scheduler's own thread, so that they see whole steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from kvserve.engine.scheduling.integrity import check_integrity
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.scheduling.usage import WorkerUsage, cache_usage

REPORT = "kvserve_report"
RECEIPTS = "kvserve_receipts"
INTEGRITY = "kvserve_integrity"
_MOST_FAULTS = 100
"""Faults that one answer names: a broken pool can have as many as pages."""


def add_utilities() -> None:
    """Let the engine core answer the calls above."""
    EngineCore.kvserve_report = _report  # type: ignore[attr-defined]
    EngineCore.kvserve_receipts = _receipts  # type: ignore[attr-defined]
    EngineCore.kvserve_integrity = _integrity  # type: ignore[attr-defined]


def _scheduler(core: EngineCore) -> Scheduler:
    return cast(Scheduler, core.scheduler)


def _manager(core: EngineCore) -> HeadPagedManager | None:
    """The manager of head pages; stock vLLM has others."""
    managers = _scheduler(core).kv_cache_manager.coordinator.single_type_managers
    first = managers[0] if managers else None
    return first if isinstance(first, HeadPagedManager) else None


def _report(core: EngineCore) -> dict[str, Any]:
    """Report the pool and what running requests hold of it."""
    scheduler, manager = _scheduler(core), _manager(core)
    pool = scheduler.kv_cache_manager.block_pool
    running, waiting = scheduler.get_request_counts()
    cache = None
    if manager is not None:
        workers: list[WorkerUsage] = core.collective_rpc("usage")
        cache = cache_usage(manager, scheduler.requests, workers)
    return {
        # Page 0 is vLLM's placeholder and is never given out.
        "pages_total": pool.num_gpu_blocks - 1,
        "pages_free": pool.get_num_free_blocks(),
        "running": running,
        "waiting": waiting,
        "cache": cache,
    }


def _receipts(core: EngineCore) -> list[dict[str, Any]] | None:
    """Return receipts, the last to end first; ``None`` without a policy."""
    manager = _manager(core)
    if manager is None:
        return None
    found = manager.ledger.receipts(_scheduler(core).requests)
    return [
        dataclasses.asdict(receipt) | {"entries_evicted": receipt.entries_evicted}
        for receipt in found
    ]


def _integrity(core: EngineCore) -> list[str] | None:
    """Return the faults of pool, lists and index; ``None`` without a policy."""
    manager = _manager(core)
    if manager is None:
        return None
    faults = check_integrity(manager, _scheduler(core).requests)
    if len(faults) > _MOST_FAULTS:
        more = len(faults) - _MOST_FAULTS
        return [*faults[:_MOST_FAULTS], f"and {more} more"]
    return faults
