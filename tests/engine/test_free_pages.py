# SPDX-License-Identifier: Apache-2.0
"""The order of free pages, against lists."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from vllm.v1.core.kv_cache_utils import (
    BlockHashWithGroupId,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
)

from kvserve.engine.scheduling.free_pages import FreePages
from tests.unit.simulator import seeds

NUM_PAGES = 24


def name(page: KVCacheBlock) -> None:
    if page.block_hash is None:
        page.set_block_hash(BlockHashWithGroupId(b"name"), 1)


def ids(pages: list[KVCacheBlock]) -> list[int]:
    return [page.block_id for page in pages]


@settings(deadline=None)
@given(seeds())
def test_unnamed_pages_go_first_then_passed_ones_then_the_oldest(rng: Random) -> None:
    pages = [KVCacheBlock(page) for page in range(NUM_PAGES)]
    queue = FreePages(FreeKVCacheBlockQueue(pages))
    main, passed, used = list(range(NUM_PAGES)), list[int](), list[int]()
    for _ in range(60):
        rng.shuffle(used)
        count = rng.randint(0, len(used))
        what = rng.choice(["append", "prepend", "pass", "remove", "pop", "pop"])
        if what in ("append", "prepend", "pass"):
            back, used = used[:count], used[count:]
            put, order = {
                "append": (queue.append_n, [*main, *back]),
                "prepend": (queue.prepend_n, [*back, *main]),
                "pass": (queue.append_passed, main),
            }[what]
            if what != "prepend":
                for page in back:
                    name(pages[page])
            put([pages[page] for page in back])
            main, passed = order, [*passed, *back] if what == "pass" else passed
        else:
            unnamed = next(
                (i for i, page in enumerate(main) if pages[page].block_hash), len(main)
            )
            order = main[:unnamed] + passed + main[unnamed:]
            gone = order[: rng.randint(0, len(order))]
            if what == "pop":
                assert ids(queue.popleft_n(len(gone))) == gone
            else:
                rng.shuffle(gone)
                for page in gone:
                    queue.remove(pages[page])
            for page in gone:
                pages[page].reset_hash()
            main = [page for page in main if page not in gone]
            passed = [page for page in passed if page not in gone]
            used += gone
        assert queue.num_free_blocks == len(main) + len(passed)
        assert ids(queue.get_all_free_blocks()) == main + passed
