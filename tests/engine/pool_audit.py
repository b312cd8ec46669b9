# SPDX-License-Identifier: Apache-2.0
"""Checks of a pool of shared pages that hold between any two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.request import Request

from kvserve.engine.scheduling.integrity import check_integrity
from kvserve.engine.scheduling.shared_manager import SharedPagedManager


class PoolAudit:
    """Watches a manager's pool: who holds a page, and who may write to it.

    The books agree, and a page with a hash or of two requests is written by nobody.

    Args:
        requests: all that have not ended, by name.
    """

    def __init__(
        self, manager: SharedPagedManager, requests: Mapping[str, Request]
    ) -> None:
        self._manager, self._pool = manager, manager.block_pool
        self._requests = requests
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
        assert check_integrity(self._manager, self._requests) == []
