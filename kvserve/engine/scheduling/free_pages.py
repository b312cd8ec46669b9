# SPDX-License-Identifier: Apache-2.0
"""The order in which a pool gives free pages out again."""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class FreePages(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, with a shorter one that goes first.

    Pages without a name come first, then *passed* pages, then all others, the least
    recently used first. A page has passed when it left the windows of a request that
    goes on: it serves nobody but a prompt that parts from the request's just there, and
    a long prompt leaves many times more of them than its cached lanes hold.

    Attributes:
        passed: the shorter queue.
        passed_ids: of its pages.

    Args:
        queue: the pool's queue so far, whose pages this one takes over.
    """

    def __init__(self, queue: FreeKVCacheBlockQueue) -> None:
        super().__init__([])
        self.num_free_blocks = queue.num_free_blocks
        self.fake_free_list_head = queue.fake_free_list_head
        self.fake_free_list_tail = queue.fake_free_list_tail
        self.passed = FreeKVCacheBlockQueue([])
        self.passed_ids: set[int] = set()

    def append_passed(self, pages: list[KVCacheBlock]) -> None:
        """Put passed pages behind those that passed before."""
        self.passed.append_n(pages)
        self.passed_ids.update(page.block_id for page in pages)
        self.num_free_blocks += len(pages)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert n <= self.num_free_blocks
        if not self.passed_ids:
            return super().popleft_n(n)
        found = super().popleft_n(self._unnamed(n))
        passed = self.passed.popleft_n(min(n - len(found), len(self.passed_ids)))
        self.passed_ids.difference_update(page.block_id for page in passed)
        self.num_free_blocks -= len(passed)
        found += passed
        return found + super().popleft_n(n - len(found))

    def remove(self, block: KVCacheBlock) -> None:
        if block.block_id in self.passed_ids:
            self.passed_ids.remove(block.block_id)
            self.passed.remove(block)
            self.num_free_blocks -= 1
        else:
            super().remove(block)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return super().get_all_free_blocks() + self.passed.get_all_free_blocks()

    def _unnamed(self, most: int) -> int:
        """Count the pages without a name at the front, up to ``most``."""
        page, count = self.fake_free_list_head.next_free_block, 0
        while (
            count < most
            and page is not None
            and page is not self.fake_free_list_tail
            and page.block_hash is None
        ):
            page, count = page.next_free_block, count + 1
        return count
