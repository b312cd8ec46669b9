# SPDX-License-Identifier: Apache-2.0
"""Two calls that vLLM's engine core answers for the HTTP routes.

They run between steps, in the scheduler's own thread, so that they see whole steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.scheduling.usage import WorkerUsage, cache_usage

REPORT = "kvserve_report"
RECEIPTS = "kvserve_receipts"


def add_utilities() -> None:
    """Let the engine core answer ``kvserve_report`` and ``kvserve_receipts``."""
    EngineCore.kvserve_report = _report  # type: ignore[attr-defined]
    EngineCore.kvserve_receipts = _receipts  # type: ignore[attr-defined]


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
