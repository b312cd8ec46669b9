# SPDX-License-Identifier: Apache-2.0
"""Checks that pool, page lists, books and prefix index agree with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from vllm.v1.core.kv_cache_utils import (
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    get_block_hash,
)

from kvserve.engine.scheduling.free_pages import FreePages
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.scheduling.prefix_index import PrefixIndex
from kvserve.plan.lanes import BoolArray, IntArray
from kvserve.plan.rule import RequestPlan

_BROKEN = "free pages: their links are broken"


class Computing(Protocol):
    """A request, as far as it says what of its pages is needed."""

    @property
    def num_computed_tokens(self) -> int: ...


def check_integrity(
    manager: HeadPagedManager, requests: Mapping[str, Computing]
) -> list[str]:
    """Find what is wrong between any two steps; nothing is changed.

    1. Of the pool's pages the first is null, the next ``num_scratch_pages`` are
       scratch, and each other is either free or held by a list, so that free, held,
       scratch and null pages are all there are. The pool counts itself without scratch.
    2. The queue of free pages is linked both ways, so that no page is there twice, and
       is as long as it counts; so is that of passed pages, which knows them by id too.
    3. A page's references are the lists that name it; a scratch page has one.
    4. No list names a page twice, and no two lists the same unless pages are shared.
    5. A list has ``plan.entries(n)`` entries, where ``n`` are the tokens for which the
       request has been given pages, refused ones included. Null is whatever the plan
       could give back before the last step, and nothing that a query after the computed
       tokens sees. ``pages_held`` counts the entries that are not null.
    6. The ledger has tokens of exactly those requests that have a list, no fewer than
       are computed, and the scheduler knows them all.
    7. A record of the prefix index has its hash as key and an entry for every place; a
       page with a hash stands in exactly one place, of the record of that hash. A page
       of a record that has not its key is gone and says nothing. Without an index no
       page has a hash, and null and scratch pages never have.

    Args:
        requests: the scheduler's, by name.

    Returns:
        A line for each fault; none, and all is sound.
    """
    lists = {
        name: np.array([page.block_id for page in pages], dtype=np.int64)
        for name, pages in manager.req_to_blocks.items()
        if pages
    }
    books = _Books(manager, requests, lists)
    return [
        *books.pages(),
        *books.lists_of_requests(),
        *books.ledger(),
        *_hashes(manager.block_pool.blocks, manager.index),
    ]


@dataclass(frozen=True)
class _Books:
    """A manager, the scheduler's requests, and the ids in every list, 0 for null."""

    manager: HeadPagedManager
    requests: Mapping[str, Computing]
    lists: dict[str, IntArray]

    def pages(self) -> Iterator[str]:
        """Check that every page is in one place, and counted there."""
        pool, scratch = self.manager.block_pool, self.manager.num_scratch_pages
        total = len(pool.blocks)
        if pool.num_gpu_blocks + scratch != total:
            yield (
                f"pool: counts {pool.num_gpu_blocks} pages and has {total}, "
                f"{scratch} of them scratch"
            )
        named = np.concatenate([np.zeros(1, dtype=np.int64), *self.lists.values()])
        held = np.bincount(named, minlength=total)
        held[0] = 0
        fixed = np.arange(total) <= scratch
        yield from self._references(held + fixed)
        yield from _lines(fixed & (held > 0), "page {}: scratch, and in a list")
        if self.manager.index is None:
            yield from _lines(held > 1, "page {}: named twice, and nothing is shared")
        queued, faults = _queued(pool.free_block_queue, total)
        yield from faults
        if queued is not None:
            free = np.bincount(queued, minlength=total) > 0
            yield from _lines(fixed & free, "page {}: null or scratch, and free")
            rest, listed = ~fixed, held > 0
            yield from _lines(rest & free & listed, "page {}: free, and in a list")
            yield from _lines(
                rest & ~free & ~listed, "page {}: neither free nor in a list"
            )

    def _references(self, expected: IntArray) -> Iterator[str]:
        """Compare references; those of the null page are not maintained."""
        blocks = self.manager.block_pool.blocks
        counted = np.array([page.ref_cnt for page in blocks], dtype=np.int64)
        for page in np.flatnonzero(counted != expected).tolist():
            if page:
                yield (
                    f"page {page}: {counted[page]} references instead of "
                    f"{expected[page]}"
                )

    def lists_of_requests(self) -> Iterator[str]:
        for name, ids in self.lists.items():
            held = ids[ids > 0]
            if len(np.unique(held)) < len(held):
                yield f"request {name}: names a page twice"
            # A request that is gone has left no plan either.
            if name not in self.requests:
                continue
            counted = self.manager.pages_held(name)
            if counted != len(held):
                yield (
                    f"request {name}: pages_held says {counted}, its list {len(held)}"
                )
            if name in self.manager.ledger.tokens:
                yield from self._against_plan(name, ids)

    def _against_plan(self, name: str, ids: IntArray) -> Iterator[str]:
        plan, tokens = self.manager.plan_of(name), self.manager.listed(name)
        entries = plan.entries(tokens)
        if len(ids) != entries:
            yield (
                f"request {name}: a list of {len(ids)} entries, for {tokens} tokens "
                f"its plan says {entries}"
            )
            return
        computed = min(self.requests[name].num_computed_tokens, tokens)
        # The last step's tokens are not computed when pages are given back.
        earliest = max(tokens - self.manager.rule.in_flight, 0)
        missing = (ids == 0) & ~_given_back(plan, entries, computed)
        kept = (ids > 0) & _given_back(plan, entries, earliest)
        if missing.any():
            yield (
                f"request {name}: {missing.sum()} entries are null that queries after "
                f"{computed} tokens see"
            )
        if kept.any():
            yield (
                f"request {name}: {kept.sum()} entries are held that no query after "
                f"{earliest} tokens sees"
            )

    def ledger(self) -> Iterator[str]:
        tokens = self.manager.ledger.tokens
        for name in sorted(tokens.keys() - self.lists.keys()):
            yield f"request {name}: tokens in the ledger, and no pages"
        for name in sorted(self.lists.keys() - tokens.keys()):
            yield f"request {name}: pages, and no tokens in the ledger"
        for name in sorted(self.lists.keys() - self.requests.keys()):
            yield f"request {name}: pages, and the scheduler does not know it"
        for name in sorted(tokens.keys() & self.requests.keys()):
            computed = self.requests[name].num_computed_tokens
            if computed > tokens[name]:
                yield (
                    f"request {name}: {tokens[name]} tokens in the ledger, "
                    f"{computed} are computed"
                )


def _given_back(plan: RequestPlan, entries: int, tokens: int) -> BoolArray:
    """Which of a list's entries are null once ``tokens`` are computed."""
    gone = np.zeros(entries, dtype=bool)
    gone[plan.given_back(0, tokens)] = True
    return gone


def _lines(faulty: BoolArray, line: str) -> Iterator[str]:
    return map(line.format, np.flatnonzero(faulty).tolist())


def _queued(
    queue: FreeKVCacheBlockQueue, most: int
) -> tuple[list[int] | None, list[str]]:
    """Return the free pages, if the queue's links are whole, and what is wrong."""
    found, faults = _walk(queue, most), list[str]()
    if isinstance(queue, FreePages):
        passed = _walk(queue.passed, most)
        if passed is None or found is None:
            return None, [_BROKEN]
        if set(passed) != queue.passed_ids:
            faults.append("free pages: the passed ones are not those known by id")
        if len(passed) != queue.passed.num_free_blocks:
            faults.append(
                f"free pages: {len(passed)} passed ones, counted as "
                f"{queue.passed.num_free_blocks}"
            )
        found += passed
    if found is None:
        return None, [_BROKEN]
    if len(found) != queue.num_free_blocks:
        faults.append(f"free pages: {len(found)}, counted as {queue.num_free_blocks}")
    return found, faults


def _walk(queue: FreeKVCacheBlockQueue, most: int) -> list[int] | None:
    """Follow a queue's links both ways; ``None`` if they are broken.

    A page that stands in a queue twice, or in two, breaks them.
    """
    found: list[int] = []
    before, tail = queue.fake_free_list_head, queue.fake_free_list_tail
    while len(found) <= most:
        page = before.next_free_block
        if page is None or page.prev_free_block is not before:
            return None
        if page is tail:
            return found
        found.append(page.block_id)
        before = page
    return None


def _hashes(pages: list[KVCacheBlock], index: PrefixIndex | None) -> Iterator[str]:
    """Compare the hashes of pages with the records of the index, both ways."""
    places: dict[int, int] = {}
    records = {} if index is None else index.records
    for block_hash, record in records.items():
        if get_block_hash(record.key) != block_hash:
            yield f"index: the record of {block_hash.hex()[:12]} has another's key"
        if len(record.pages) != record.needs.width(record.block):
            yield (
                f"index: the record of {block_hash.hex()[:12]} has "
                f"{len(record.pages)} places instead of "
                f"{record.needs.width(record.block)}"
            )
        key = record.key
        for page in record.pages:
            if page.block_hash == key:
                places[page.block_id] = places.get(page.block_id, 0) + 1
    for page in pages:
        if page.block_hash is None:
            continue
        count = places.get(page.block_id, 0)
        if count != 1:
            yield f"page {page.block_id}: has a hash and stands in {count} places"
