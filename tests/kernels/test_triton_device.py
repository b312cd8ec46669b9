# SPDX-License-Identifier: Apache-2.0
"""The GPU's device gives back what it was given, and waits for nothing.

Needs no vLLM. Without a GPU, ``TRITON_INTERPRET=1`` runs most of it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvserve.engine.devices.uploads import Buffer
from kvserve.kernels import reference, statistics
from tests.kernels.cases import DEVICE, INTERPRETED
from tests.kernels.device_cache import GROUP, LENGTHS, PAGES, SCALE, SIZE, WIDTH, Cache

# After the check that there is something to run Triton.
from kvserve.engine.devices.gpu import TritonRows  # isort: skip

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail where something inside waits for the GPU."""
    if INTERPRETED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pages_read_as_they_were_written() -> None:
    cache = Cache()
    pages = cache.table.long()
    found = cache.device.read_keys(cache.pool, pages)
    assert found.shape == (*pages.shape, SIZE, WIDTH)
    assert torch.equal(found.reshape(-1, WIDTH), cache.keys)
    found = cache.device.read_values(cache.pool, pages)
    assert torch.equal(found.reshape(-1, WIDTH), cache.values)


def test_attention_is_added_to_the_rows_that_are_meant() -> None:
    cache, cached = Cache(), Cache().rows(0, 2, 4)
    mass = torch.ones(PAGES, SIZE, device=DEVICE)
    expected = mass.clone()
    keys = cache.keys_of(cached)
    statistics.add_row_attention(cache.query, keys, cached, SCALE, expected)
    cache.device.prepare_statistics(cache.pool)
    with no_waiting():
        cache.device.add_row_attention(cache.query, cache.pool, cached, SCALE, mass)
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_count", [False, True])
def test_the_lightest_slots_are_those_of_the_statistics(by_count: bool) -> None:
    cache, cached = Cache(), Cache().rows(0, 4)
    mass = torch.rand(PAGES, SIZE, device=DEVICE)
    order = torch.arange(PAGES * SIZE, device=DEVICE).view(PAGES, SIZE)
    position = (order % 97).int()
    own = torch.full((len(LENGTHS),), 200, device=DEVICE).int()
    state = mass, position, own, torch.full((len(LENGTHS),), 90, device=DEVICE)
    with no_waiting():
        found = cache.device.lightest_slots(cached, *state, by_count)
    unbounded = replace(cached, width=None)
    assert torch.equal(found, statistics.lightest_slots(unbounded, *state, by_count))


def test_rows_of_one_query_behind_the_decodes_are_head_major() -> None:
    cache, heads = Cache(), 2
    # A decode, and a chunk of two tokens across a page's edge: rows by row number.
    query = torch.randn(3, heads * GROUP, WIDTH, device=DEVICE)
    by_head = query.view(3, heads, GROUP, WIDTH)
    order = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (2, 1)]
    lengths = torch.tensor([40, 5, 32, 33, 96, 97], dtype=torch.int32, device=DEVICE)
    table = cache.table[[0, 1, 2, 2, 4, 4]]
    starts = torch.arange(7, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(query, float("nan"))
    rows = TritonRows(2, starts, lengths, 1)
    cache.device.attend(query, cache.pool, rows, table, SCALE, out)
    chosen = torch.stack([by_head[place] for place in order])
    expected = reference.row_attention(
        chosen, cache.pool, starts, lengths, table, SCALE
    )
    found = torch.stack([out.view_as(by_head)[place] for place in order])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_graph_of_a_decode_step_follows_what_is_staged() -> None:
    cache, rows = Cache(), len(LENGTHS)
    slots = Buffer(rows, torch.int64, DEVICE)
    lengths = Buffer(rows, torch.int32, DEVICE)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
    key, value = torch.randn(2, rows, WIDTH, device=DEVICE)
    out = torch.empty_like(cache.query)

    def stage(seed: int) -> tuple[Tensor, TritonRows]:
        source = np.random.default_rng(seed)
        seq_lens = source.integers(1, 97, rows).astype(np.int32)
        seq_lens[-1] = 0  # padding
        last = np.maximum(seq_lens - 1, 0)
        page = cache.table.cpu().numpy()[np.arange(rows), last // SIZE]
        slot = page.astype(np.int64) * SIZE + last % SIZE
        slot[-1] = -1
        own = lengths.put(seq_lens)
        return slots.put(slot), TritonRows(rows, starts, own, 1)

    def step(where: Tensor, what: TritonRows) -> None:
        cache.device.write(key, value, cache.pool, where)
        cache.device.attend(cache.query, cache.pool, what, cache.table, SCALE, out)

    staged = stage(0)
    step(*staged)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*staged)
    for seed in (1, 2):
        with no_waiting():
            where, what = stage(seed)
        graph.replay()
        read = what.query_start, what.seq_lens, cache.table, SCALE
        expected = reference.row_attention(cache.query, cache.pool, *read)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert not out[-1].any()
        assert torch.equal(cache.pool.view(-1, 2 * WIDTH)[where[0], :WIDTH], key[0])
