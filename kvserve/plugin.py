# SPDX-License-Identifier: Apache-2.0
"""vLLM entry points. They run in every vLLM process, and may run more than once."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM's scheduler about head pages; nothing changes until they are used.

    The engine core learns three calls besides, which the HTTP routes make; on a CPU
    there are more kernels to choose from. Processes that vLLM starts learn to end with
    the one that starts them.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from kvserve.engine.devices import cpu_operators
    from kvserve.engine.scheduling.manager import HeadPagedManager
    from kvserve.engine.scheduling.orphans import watch_over_parents
    from kvserve.engine.scheduling.report import add_utilities
    from kvserve.engine.scheduling.shared_manager import SharedPagedManager
    from kvserve.engine.spec import HeadPagedSpec, SharedPagedSpec

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadPagedSpec, HeadPagedManager)
    KVCacheSpecRegistry.register(SharedPagedSpec, SharedPagedManager)
    add_utilities()
    watch_over_parents()
    if current_platform.is_cpu():
        cpu_operators.register()
