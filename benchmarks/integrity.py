# SPDX-License-Identifier: Apache-2.0
"""How long a check of pool, lists, books and index keeps an engine waiting.

No weights: vLLM's cache manager over a pool of head pages, idle, full of requests that
share nothing, and full of requests that share prefixes.

    python -m benchmarks.integrity --pages 100000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from benchmarks.scheduler import MODELS, EveryFifth
from benchmarks.tables import OUT, Report, Spread, Table
from kvserve.engine.scheduling.integrity import check_integrity
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.spec import HeadPagedSpec, SharedPagedSpec
from kvserve.plan.streaming import StreamRule
from kvserve.plugin import register

PAGE, CHUNK, TOKENS, ROUNDS = 32, 2048, 4096, 20


class Pool:
    """A pool, and requests of ``TOKENS`` tokens that fill it."""

    def __init__(self, pages: int, is_shared: bool) -> None:
        rule = StreamRule(
            EveryFifth(),
            MODELS["135M"],
            PAGE,
            TOKENS,
            in_flight=CHUNK,
            is_shared=is_shared,
        )
        spec = (SharedPagedSpec if rule.is_shared else HeadPagedSpec)(
            block_size=PAGE,
            num_kv_heads=1,
            head_size=rule.model.head_size,
            dtype=torch.bfloat16,
            plan=rule.longest,
            rule=rule,
            num_scratch_pages=0,
        )
        config = KVCacheConfig(pages, [], [KVCacheGroupSpec(["first"], spec)])
        self._cache = KVCacheManager(config, TOKENS, PAGE, PAGE, log_stats=False)
        (manager,) = self._cache.coordinator.single_type_managers
        assert isinstance(manager, HeadPagedManager)
        self._manager = manager
        self.requests: dict[str, Request] = {}

    def fill(self) -> None:
        """Take requests until one more does not fit; half of each prompt is new."""
        hasher = get_request_block_hasher(PAGE, sha256)
        while True:
            name = str(len(self.requests))
            text = [0] * (TOKENS // 2) + [len(self.requests)] * (TOKENS // 2)
            request = Request(
                name, text, SamplingParams(max_tokens=1), None, block_hasher=hasher
            )
            found: KVCacheBlocks | None
            found, cached, _ = self._cache.get_computed_blocks(request)
            while request.num_computed_tokens < TOKENS:
                start = request.num_computed_tokens + cached
                length = min(CHUNK, TOKENS - start)
                if self._cache.allocate_slots(request, length, cached, found) is None:
                    self._cache.free(request)
                    return
                request.num_computed_tokens = start + length
                cached, found = 0, None
            self.requests[name] = request

    def check(self) -> float:
        """Return the seconds that a check takes."""
        start = time.perf_counter()
        faults = check_integrity(self._manager, self.requests)
        seconds = time.perf_counter() - start
        assert faults == []
        return seconds

    @property
    def held(self) -> int:
        pool = self._cache.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def main() -> None:
    """Time checks and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    register()
    init_none_hash(sha256)
    report = Report("integrity")
    columns = ["pages are", "pages", "held", "requests", "check, ms"]
    table = Table("Time of a check", columns)
    for name, is_shared in (("of one request", False), ("shared", True)):
        pool = Pool(args.pages, is_shared)
        for state in ("idle", "full"):
            seconds = [pool.check() for _ in range(ROUNDS)]
            size = [str(args.pages), str(pool.held), str(len(pool.requests))]
            table.rows.append([name, *size, Spread.of(seconds).shown(1e3, 1)])
            report.numbers[f"{name}, {state}"] = seconds
            pool.fill()
    report.tables.append(table)
    report.write(args.out)


if __name__ == "__main__":
    main()
