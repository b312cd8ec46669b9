# SPDX-License-Identifier: Apache-2.0
"""States of layers that keep no tokens: Mamba, linear attention, short convolutions.

Their size does not depend on a request's length, so nothing is to be planned: each
request that runs has one slot, and as many are set aside as requests may run. The
layers, their kernels and their metadata are vLLM's own, which calls a slot a block of a
cache group. The scheduler knows nothing of it; the worker adds slots to what it is told
of pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
)
from vllm.v1.worker.utils import allocate_kv_cache


class States:
    """Slots for the states of requests that run.

    Attributes:
        groups: state layers of one kind each.

    Args:
        specs: of all state layers, by name.
        most_requests: that may run at once.
    """

    def __init__(self, specs: dict[str, MambaSpec], most_requests: int) -> None:
        by_spec: dict[MambaSpec, list[str]] = {}
        for name, spec in specs.items():
            by_spec.setdefault(spec, []).append(name)
        self.groups = [KVCacheGroupSpec(names, spec) for spec, names in by_spec.items()]
        # vLLM's kernels take slot 0 for padding.
        self._num_slots = most_requests + 1
        self._free = [*range(most_requests, 0, -1)]
        self._slot_of: dict[str, int] = {}

    def group_bytes(self, group: KVCacheGroupSpec) -> int:
        """Bytes of all slots of a group."""
        one = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        return self._num_slots * one

    @property
    def num_bytes(self) -> int:
        """Bytes that are set aside."""
        return sum(map(self.group_bytes, self.groups))

    @property
    def slots_held(self) -> dict[str, int]:
        """The slot of each request that has one."""
        return dict(self._slot_of)

    def schedule(self, output: SchedulerOutput) -> None:
        """Take and give back slots as a step asks, and tell the runner of them."""
        if not self.groups:
            return
        self._give_back(output.preempted_req_ids or ())
        self._give_back(output.finished_req_ids)
        for new in output.scheduled_new_reqs:
            new.block_ids = (*new.block_ids, *self._take(new.req_id))
        cached = output.scheduled_cached_reqs
        for place, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[place]
            if name in cached.resumed_req_ids:
                assert blocks is not None, "a resumed request starts anew"
                cached.new_block_ids[place] = (*blocks, *self._take(name))
            elif blocks is not None:
                nothing: list[list[int]] = [[] for _ in self.groups]
                cached.new_block_ids[place] = (*blocks, *nothing)

    def _take(self, request_id: str) -> list[list[int]]:
        slot = self._slot_of.get(request_id)
        if slot is None:
            slot = self._slot_of[request_id] = self._free.pop()
        return [[slot] for _ in self.groups]

    def _give_back(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                self._free.append(slot)

    def added_to(self, config: KVCacheConfig) -> KVCacheConfig:
        """What the runner is to know of: head pages, and the groups of states."""
        groups = [*config.kv_cache_groups, *self.groups]
        return dataclasses.replace(config, kv_cache_groups=groups)

    def allocate_with(self, runner: Any, vllm_config: VllmConfig) -> None:
        """Let a runner allocate states beside head pages: they share no memory."""
        stock = runner.initialize_kv_cache_tensors

        def allocate(
            config: KVCacheConfig, kernel_block_sizes: list[int], **kwargs: Any
        ) -> Any:
            states = len(self.groups)
            heads = len(config.kv_cache_groups) - states
            own = dataclasses.replace(
                config, kv_cache_groups=config.kv_cache_groups[:heads]
            )
            caches = stock(own, kernel_block_sizes[:heads], **kwargs)
            for group in self.groups:
                self._allocate(group, runner, vllm_config)
            return caches

        runner.initialize_kv_cache_tensors = allocate

    def _allocate(
        self, group: KVCacheGroupSpec, runner: Any, vllm_config: VllmConfig
    ) -> None:
        config = get_kv_cache_config_from_groups(
            vllm_config, [group], self.group_bytes(group)
        )
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        layers = vllm_config.compilation_config.static_forward_context
        caches = allocate_kv_cache(config, runner.device, layout)
        for name, cache in caches.items():
            layers[name].bind_kv_cache(cache)


def state_specs(specs: dict[str, KVCacheSpec]) -> dict[str, MambaSpec]:
    """Pick the layers that keep states, whose pages need not be as long as others."""
    return {
        name: dataclasses.replace(spec, page_size_padded=None)
        for name, spec in specs.items()
        if isinstance(spec, MambaSpec)
    }
