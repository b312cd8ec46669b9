# SPDX-License-Identifier: Apache-2.0
"""Books that agree are sound, and each way to break them is named."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock

from kvserve.engine.scheduling.free_pages import FreePages
from kvserve.engine.scheduling.prefix_index import CachedBlock
from kvserve.engine.scheduling.shared_manager import SharedPagedManager
from tests.unit.engine.scheduling.books import RULES, SCRATCH, Books, random_load
from tests.unit.simulator import seeds

NULL, FIRST_SCRATCH = 0, 1


@pytest.mark.parametrize("kind", RULES)
@settings(max_examples=30)
@given(seeds())
def test_any_load_leaves_sound_books(kind: str, rng: Random) -> None:
    books = Books(kind, num_pages=80)
    random_load(books, rng, events=60)
    for request in list(books.requests.values()):
        books.end(request)
    assert books.faults() == []
    assert books.cache.usage == 0


@pytest.mark.parametrize("kind", ["guessing", "guessing and shared"])
def test_refused_tokens_leave_pages_and_no_trace_in_the_books(kind: str) -> None:
    books = Books(kind)
    request = books.run("a", 100, 10)
    tokens, names = request.num_computed_tokens, dict(books.manager.num_cached_block)
    for _ in range(3):
        before = books.manager.ledger.tokens["a"]
        assert books.step(request, 1, guesses=40)
        assert books.manager.ledger.tokens["a"] == before + 1
        assert books.faults() == []
    listed = books.manager.listed("a")
    assert listed == tokens + 3 + 40
    assert len(pages(books)) == books.manager.plan_of("a").entries(listed)
    assert books.manager.num_cached_block == names
    books.end(request)
    assert books.cache.usage == 0
    receipt = books.manager.ledger.receipts(())[0]
    assert receipt.tokens_seen == tokens + 3


@pytest.fixture
def ring() -> Books:
    """Two requests that share nothing."""
    books = Books("ring")
    for name in ("a", "b"):
        books.run(name, 200, 10)
    assert books.faults() == []
    return books


@pytest.fixture
def shared() -> Books:
    """A request that has gone past its windows, and pages that it has passed."""
    books = Books("shared")
    books.run("a", 400, 10)
    assert books.faults() == []
    assert passed(books).passed_ids
    return books


@pytest.fixture
def dense() -> Books:
    """A request that has dropped most of its prompt."""
    books = Books("dense")
    books.run("a", 400, 2)
    assert books.faults() == []
    return books


def pages(books: Books, name: str = "a") -> list[KVCacheBlock]:
    found: list[KVCacheBlock] = books.manager.req_to_blocks[name]
    return found


def passed(books: Books) -> FreePages:
    queue = books.pool.free_block_queue
    assert isinstance(queue, FreePages)
    return queue


def records(books: Books) -> dict[BlockHash, CachedBlock]:
    assert isinstance(books.manager, SharedPagedManager)
    return books.manager.index._records


def named(books: Books, fault: str) -> bool:
    """Tell whether a check finds the fault, among what follows from it."""
    return fault in books.faults()


def test_a_pool_that_miscounts_itself(ring: Books) -> None:
    ring.pool.num_gpu_blocks += 1
    assert named(ring, f"pool: counts 396 pages and has 400, {SCRATCH} of them scratch")


@pytest.mark.parametrize("page", [NULL, FIRST_SCRATCH])
def test_a_page_that_is_nobodys_to_give_is_free(ring: Books, page: int) -> None:
    ring.pool.free_block_queue.append(ring.pool.blocks[page])
    assert ring.faults() == [f"page {page}: null or scratch, and free"]


def test_a_scratch_page_in_a_list(ring: Books) -> None:
    ring.pool.blocks[FIRST_SCRATCH].ref_cnt += 1
    pages(ring)[0] = ring.pool.blocks[FIRST_SCRATCH]
    assert named(ring, f"page {FIRST_SCRATCH}: scratch, and in a list")


def test_a_page_that_leaked(ring: Books) -> None:
    (page,) = ring.pool.get_new_blocks(1)
    page.ref_cnt = 0
    assert ring.faults() == [f"page {page.block_id}: neither free nor in a list"]


def test_a_page_that_is_free_and_held(ring: Books) -> None:
    page = pages(ring)[3]
    ring.pool.free_block_queue.append(page)
    assert ring.faults() == [f"page {page.block_id}: free, and in a list"]


def test_references_that_are_not_the_lists(ring: Books) -> None:
    page = pages(ring)[3]
    page.ref_cnt += 1
    assert ring.faults() == [f"page {page.block_id}: 2 references instead of 1"]


def test_references_of_scratch(ring: Books) -> None:
    ring.pool.blocks[FIRST_SCRATCH].ref_cnt = 0
    assert ring.faults() == [f"page {FIRST_SCRATCH}: 0 references instead of 1"]


@pytest.mark.parametrize("queue", ["main", "passed"])
def test_free_pages_that_miscount_themselves(shared: Books, queue: str) -> None:
    free = passed(shared)
    if queue == "main":
        count = free.num_free_blocks
        free.num_free_blocks += 1
        expected = f"free pages: {count}, counted as {count + 1}"
    else:
        count = len(free.passed_ids)
        free.passed.num_free_blocks += 1
        expected = f"free pages: {count} passed ones, counted as {count + 1}"
    assert shared.faults() == [expected]


def test_a_passed_page_that_is_not_known_as_one(shared: Books) -> None:
    passed(shared).passed_ids.pop()
    expected = "free pages: the passed ones are not those known by id"
    assert shared.faults() == [expected]


def test_a_page_twice_among_the_free(ring: Books) -> None:
    queue = ring.pool.free_block_queue
    page = queue.get_all_free_blocks()[4]
    queue.append(page)
    assert ring.faults() == ["free pages: their links are broken"]


def test_free_pages_in_a_ring(shared: Books) -> None:
    queue = passed(shared).passed
    first, second = queue.get_all_free_blocks()[:2]
    second.next_free_block, first.prev_free_block = first, second
    assert shared.faults() == ["free pages: their links are broken"]


def test_a_page_twice_in_one_list(shared: Books) -> None:
    held = pages(shared)
    again = held[0]
    held[1].ref_cnt -= 1
    shared.pool.free_block_queue.append(held[1])
    again.ref_cnt += 1
    held[1] = again
    assert shared.faults() == ["request a: names a page twice"]


def test_a_page_in_two_lists_where_nothing_is_shared(ring: Books) -> None:
    page, other = pages(ring)[0], pages(ring, "b")[0]
    ring.pool.free_blocks([other])
    page.ref_cnt += 1
    pages(ring, "b")[0] = page
    expected = f"page {page.block_id}: named twice, and nothing is shared"
    assert ring.faults() == [expected]


def test_a_page_in_two_lists_is_sound_where_pages_are_shared(shared: Books) -> None:
    shared.run("b", 400, 10)
    assert any(page.ref_cnt == 2 for page in pages(shared))
    assert shared.faults() == []


def test_a_list_longer_than_its_plan(ring: Books) -> None:
    entries = len(pages(ring))
    pages(ring).extend(ring.pool.get_new_blocks(1))
    ring.manager._held["a"] += 1
    expected = (
        f"request a: a list of {entries + 1} entries, for 210 tokens its plan says "
        f"{entries}"
    )
    assert ring.faults() == [expected]


def test_pages_held_that_are_not_those_of_the_list(ring: Books) -> None:
    held = len(pages(ring))
    ring.manager._held["a"] += 1
    assert ring.faults() == [f"request a: pages_held says {held + 1}, its list {held}"]


def test_a_window_given_back_too_early(shared: Books) -> None:
    page = pages(shared)[-1]
    pages(shared)[-1] = shared.pool.null_block
    shared.pool.free_blocks([page])
    shared.manager._held["a"] -= 1
    expected = "request a: 1 entries are null that queries after 410 tokens see"
    assert shared.faults() == [expected]


def test_a_window_never_given_back(shared: Books) -> None:
    entry = pages(shared).index(shared.pool.null_block)
    pages(shared)[entry : entry + 1] = shared.pool.get_new_blocks(1)
    shared.manager._held["a"] += 1
    expected = "request a: 1 entries are held that no query after 314 tokens sees"
    assert shared.faults() == [expected]


def test_a_prompt_never_given_back(dense: Books) -> None:
    held = pages(dense)
    null = [entry for entry, page in enumerate(held) if page.is_null]
    for entry, page in zip(null, dense.pool.get_new_blocks(len(null)), strict=True):
        held[entry] = page
    dense.manager._held["a"] += len(null)
    expected = (
        f"request a: {len(null)} entries are held that no query after 401 tokens sees"
    )
    assert dense.faults() == [expected]


def test_tokens_without_pages(ring: Books) -> None:
    ring.manager.ledger.tokens["c"] = 4
    assert ring.faults() == ["request c: tokens in the ledger, and no pages"]


def test_pages_without_tokens(ring: Books) -> None:
    del ring.manager.ledger.tokens["a"]
    assert ring.faults() == ["request a: pages, and no tokens in the ledger"]


def test_pages_of_a_request_that_is_gone(ring: Books) -> None:
    del ring.requests["a"]
    assert ring.faults() == ["request a: pages, and the scheduler does not know it"]


def test_more_tokens_computed_than_in_the_ledger(ring: Books) -> None:
    ring.requests["a"].num_computed_tokens += 1
    assert ring.faults() == ["request a: 210 tokens in the ledger, 211 are computed"]


def test_a_record_under_the_wrong_hash(shared: Books) -> None:
    block_hash, record = next(iter(records(shared).items()))
    del records(shared)[block_hash]
    wrong = BlockHash(bytes(reversed(block_hash)))
    records(shared)[wrong] = record
    expected = f"index: the record of {wrong.hex()[:12]} has another's key"
    assert shared.faults() == [expected]


def test_a_record_without_all_places(shared: Books) -> None:
    block_hash, record = next(iter(records(shared).items()))
    record.pages.append(shared.pool.null_block)
    expected = f"index: the record of {block_hash.hex()[:12]} has 3 places instead of 2"
    assert shared.faults() == [expected]


def test_a_page_with_a_hash_that_no_record_has(shared: Books) -> None:
    (block_hash, record), *_ = records(shared).items()
    del records(shared)[block_hash]
    found = [p for p in record.pages if p.block_hash == record.key]
    assert found
    for page in found:
        expected = f"page {page.block_id}: has a hash and stands in 0 places"
        assert named(shared, expected)


def test_a_page_in_two_places(shared: Books) -> None:
    record = next(iter(records(shared).values()))
    page = record.pages[1] = record.pages[0]
    expected = f"page {page.block_id}: has a hash and stands in 2 places"
    assert named(shared, expected)


def test_a_hash_where_nothing_is_shared(ring: Books) -> None:
    pages(ring)[0].set_block_hash(BlockHashWithGroupId(b"name"), 32)
    page = pages(ring)[0].block_id
    assert ring.faults() == [f"page {page}: has a hash and stands in 0 places"]


def test_a_scratch_page_with_a_hash(shared: Books) -> None:
    record = next(iter(records(shared).values()))
    shared.pool.blocks[FIRST_SCRATCH].set_block_hash(record.key, 32)
    expected = f"page {FIRST_SCRATCH}: has a hash and stands in 0 places"
    assert shared.faults() == [expected]


def test_pages_that_a_reset_took_from_their_records_are_sound(shared: Books) -> None:
    shared.end(shared.requests["a"])
    assert shared.cache.reset_prefix_cache()
    assert records(shared)
    assert shared.faults() == []
