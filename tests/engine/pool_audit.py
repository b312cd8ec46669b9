# SPDX-License-Identifier: Apache-2.0
"""Checks of a pool of shared pages that hold between any two steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvserve.engine.scheduling.shared_manager import SharedPagedManager


class PoolAudit:
    """Watches a manager's pool: who holds a page, and who may write to it.

    No page is held that no request lists, none is free that one does, references are
    the lists that a page is in, and a page with a hash is written by nobody.
    """

    def __init__(self, manager: SharedPagedManager) -> None:
        self._manager, self._pool = manager, manager.block_pool
        self._given_out: set[int] = set()
        self._closed: set[int] = set()
        get_new_blocks = self._pool.get_new_blocks

        def watched(count: int) -> list[Any]:
            pages: list[Any] = get_new_blocks(count)
            self._given_out |= {page.block_id for page in pages}
            return pages

        self._pool.get_new_blocks = watched

    def begin_step(self) -> None:
        """Note the pages that the step must not write to, unless it is given them."""
        self._given_out.clear()
        self._closed = {
            page.block_id
            for page in self._pool.blocks
            if page.block_hash is not None or page.ref_cnt != 1
        }

    def end_step(self, written: set[int]) -> None:
        """Check the books after a step that wrote to the pages ``written``."""
        assert not (written & self._closed) - self._given_out
        self.check_books()

    def check_books(self) -> None:
        lists = self._manager.req_to_blocks
        holders = Counter[int]()
        for name, pages in lists.items():
            held = [page.block_id for page in pages if not page.is_null]
            assert len(set(held)) == len(held) == self._manager.pages_held(name)
            holders.update(held)
        null = self._pool.null_block
        for page in self._pool.blocks:
            if page is not null:
                assert page.ref_cnt == holders[page.block_id]
        free = [p.block_id for p in self._pool.free_block_queue.get_all_free_blocks()]
        assert len(set(free)) == len(free) == self._pool.get_num_free_blocks()
        everything = {page.block_id for page in self._pool.blocks} - {null.block_id}
        assert set(free) == everything - set(holders)
        self._check_hashes()

    def _check_hashes(self) -> None:
        """Hashed pages are those of the records, each in one place."""
        named = Counter(
            page.block_id
            for record in self._manager._index._records.values()
            for page in record.pages
            if page.block_hash == record.key
        )
        hashed = {p.block_id for p in self._pool.blocks if p.block_hash is not None}
        assert set(named) == hashed
        assert set(named.values()) <= {1}
