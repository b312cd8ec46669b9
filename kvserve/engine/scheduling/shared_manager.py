# SPDX-License-Identifier: Apache-2.0
"""Allocates head pages that requests with a common prefix share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from kvserve.engine.scheduling.free_pages import FreePages
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.scheduling.prefix_index import PrefixIndex
from kvserve.engine.spec import SharedPagedSpec
from kvserve.plan.lanes import BoolArray, IntArray
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.prefix import PrefixPages


class SharedPagedManager(HeadPagedManager):
    """Gives a request the cached pages of its prefix, and new ones behind them.

    Invariants: the page list of a request has ``plan.entries(n)`` entries, null where
    no later query sees the page; a page's references are the requests that list it; a
    page with a hash is full, and nobody writes to it.
    """

    index: PrefixIndex

    def __init__(
        self, kv_cache_spec: SharedPagedSpec, block_pool: BlockPool, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._free_pages = FreePages(block_pool.free_block_queue)
        block_pool.free_block_queue = self._free_pages
        self.index = PrefixIndex(self._null_block, self.kv_cache_group_id)
        # Pages by which some request has started, till the pool gives them out again.
        self._proven: set[int] = set()
        # Where a request parts from what is cached, by the last look-up and by name.
        self._junction = 0
        self._junctions: dict[str, int] = {}
        # Clients name plans without end: one lives as long as a request or its pages.
        self._needs: WeakValueDictionary[PagePlan, PrefixPages] = WeakValueDictionary()
        self._needs_of: dict[str, PrefixPages] = {}

    def plan_of(self, request_id: str) -> PagePlan:
        return cast(PagePlan, super().plan_of(request_id))

    @property
    def common_plan(self) -> PagePlan:
        """The plan of requests that have none of their own."""
        return self._plan

    def needs_of(self, request_id: str) -> PrefixPages:
        """Return what a request needs of a prefix, once it has begun."""
        found = self._needs_of.get(request_id)
        if found is None:
            plan = self.plan_of(request_id)
            found = self._needs.get(plan) or PrefixPages(plan)
            self._needs[plan] = self._needs_of[request_id] = found
        return found

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._needs_of.pop(request_id, None)

    def find_longest_cache_hit(  # type: ignore[override]
        self, block_hashes: Sequence[BlockHash], max_length: int, **_: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find the longest cached prefix of at most ``max_length`` tokens.

        The plan is part of the hashes where requests have plans of their own.
        """
        found, blocks, self._junction = self.index.longest_hit(
            block_hashes, max_length // self.block_size
        )
        return (found,), blocks * self.block_size

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Start a request with the cached pages of its prefix."""
        held = self.req_to_blocks[request_id]
        assert not held
        pages = [page for page in new_computed_blocks if not page.is_null]
        self.block_pool.touch(pages)
        held.extend(new_computed_blocks)
        blocks = num_local_computed_tokens // self.block_size
        self.num_cached_block[request_id] = blocks
        self._computed[request_id] = num_local_computed_tokens
        self.ledger.begun(request_id, num_local_computed_tokens)
        self._held[request_id] = len(pages)
        needs = self.needs_of(request_id)
        window = held[needs.first_entry(max(blocks - needs.window, 0)) :]
        self._proven.update(page.block_id for page in window)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self._junctions.setdefault(request_id, self._junction)
        pages = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        if self._proven:
            self._proven.difference_update(page.block_id for page in pages)
        return pages

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Name the pages of full blocks, for requests to come and of this very step.

        A layer writes the keys and values of all tokens of a step before it attends to
        any, so pages that the step is to fill can be given out in the same step.
        """
        name = request.request_id
        first = self.num_cached_block.get(name, 0)
        last = num_tokens // self.block_size
        if first >= last:
            return
        needs, held = self.needs_of(name), self.req_to_blocks[name]
        for block in range(first, last):
            pages = held[needs.first_entry(block) : needs.first_entry(block + 1)]
            tokens = (block + 1) * self.block_size
            self.index.insert(request.block_hashes[block], pages, block, tokens, needs)
        self.num_cached_block[name] = last

    def uncache(self, request: Request, num_tokens: int) -> None:
        """Take back the names of pages behind ``num_tokens``, which stay unfilled."""
        name = request.request_id
        first = num_tokens // self.block_size
        needs, held = self.needs_of(name), self.req_to_blocks.get(name, [])
        for block in range(first, self.num_cached_block.get(name, 0)):
            pages = held[needs.first_entry(block) : needs.first_entry(block + 1)]
            self.index.forget(request.block_hashes[block], pages)

    def _give_back(
        self, request_id: str, entries: IntArray, num_prompt_tokens: int
    ) -> None:
        """Give pages back to the pool, those last that others may well start with.

        Pages keep their names, and serve others until the pool gives them out again.
        Those that go last are pages by which a request has started before, and windows
        in front of two boundaries: the prompt's end, where the same prompt would start,
        and the junction, where this one parts from what was cached when it came.
        """
        needs, held = self.needs_of(request_id), self.req_to_blocks[request_id]
        ahead = np.array(
            [(num_prompt_tokens - 1) // self.block_size, self._junctions[request_id]]
        )
        distance = ahead - needs.blocks_of(entries)[:, None]
        in_window = (distance > 0) & (distance < needs.window)
        likely: BoolArray = np.any(in_window, axis=1)
        passed: list[KVCacheBlock] = []
        kept: list[KVCacheBlock] = []
        for entry, is_likely in zip(entries.tolist(), likely.tolist(), strict=True):
            page = held[entry]
            if is_likely or page.block_id in self._proven:
                kept.append(page)
                continue
            page.ref_cnt -= 1
            if page.ref_cnt == 0:
                passed.append(page)
        self.block_pool.free_blocks(kept)
        self._free_pages.append_passed(passed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._junctions.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
