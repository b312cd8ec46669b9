# SPDX-License-Identifier: Apache-2.0
"""Attention statistics against whole attention matrices, in PyTorch and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvserve.kernels import native, statistics
from kvserve.kernels.statistics import CachedRows, lightest, row_attention

MASS = pytest.mark.parametrize(
    "attention_mass", [statistics.attention_mass, native.attention_mass]
)
Mass = Callable[[Tensor, Tensor, float], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    assert native.library() is not None


def column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mass of all keys, of the last tokens' queries, by way of float64."""
    kv_heads, keys, width = key.shape
    queries = query.shape[1]
    grouped = query.double().reshape(kv_heads, -1, queries, width)
    logits = grouped @ key.double().transpose(1, 2)[:, None] * scale
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    weights = logits.masked_fill(future, float("-inf")).softmax(dim=-1)
    return weights.sum(dim=(1, 2)).float()


@MASS
@pytest.mark.parametrize("chunk", [1, 7, 64, 300, 333])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_mass_adds_up_over_chunks_to_the_column_sums(
    attention_mass: Mass, chunk: int, kv_heads: int
) -> None:
    random = torch.Generator().manual_seed(chunk)
    query = torch.randn(6, 333, 16, generator=random)
    key = torch.randn(kv_heads, 333, 16, generator=random)
    total = torch.zeros(kv_heads, 333)
    for first in range(0, 333, chunk):
        last = min(first + chunk, 333)
        total[:, :last] += attention_mass(query[:, first:last], key[:, :last], 0.25)
    expected = column_sums(query, key, 0.25)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@MASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "width"),
    [(9, 3, 300, 700, 64), (4, 4, 1, 257, 128), (8, 1, 37, 256, 32), (2, 2, 5, 5, 64)],
)
def test_mass_is_exact_in_every_type_and_shape(
    attention_mass: Mass,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    width: int,
) -> None:
    random = torch.Generator().manual_seed(keys)
    query = torch.randn(queries, heads, width, generator=random).to(dtype)
    key = torch.randn(kv_heads, keys + 9, width, generator=random).to(dtype)[:, :keys]
    found = attention_mass(query.transpose(0, 1), key, 0.125)
    assert found.dtype == torch.float32
    expected = column_sums(query.transpose(0, 1), key, 0.125)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@MASS
@pytest.mark.parametrize("size", [30.0, 3000.0, -3000.0])
def test_mass_of_a_long_row_of_large_logits_is_finite_and_adds_up(
    attention_mass: Mass, size: float
) -> None:
    random = torch.Generator().manual_seed(1)
    query = torch.randn(3, 3, 64, generator=random)
    key = torch.randn(1, 9000, 64, generator=random)
    # A direction of its own lifts all logits far from 0, and leaves attention alone.
    query[..., 0], key[..., 0] = 1, size
    found = attention_mass(query, key, 1.0)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(), torch.tensor(9.0))
    # A logit of 3000 is known to 2^-13 in float32.
    expected, error = column_sums(query, key, 1.0), max(abs(size), 100) * 1e-6
    torch.testing.assert_close(found, expected, rtol=error, atol=1e-5)


def test_compiled_mass_is_the_same_bit_for_bit_when_repeated() -> None:
    query, key = torch.randn(6, 500, 64), torch.randn(2, 900, 64)
    first = native.attention_mass(query, key, 0.1)
    assert torch.equal(first, native.attention_mass(query, key, 0.1))


def test_a_row_sees_its_own_length_and_no_rubbish_beyond() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 8, generator=random), torch.randn(2, 10, 8)
    key[0, 4:], key[1, 9:] = float("nan"), float("inf")
    found = row_attention(query, key, torch.tensor([4, 9]), 0.5)
    for row, length in enumerate((4, 9)):
        weights = (query[row] @ key[row, :length].T * 0.5).softmax(dim=-1)
        torch.testing.assert_close(found[row, :length], weights.sum(dim=0))
        assert found[row, length:].abs().max() == 0


def cached_rows(lengths: list[int], size: int, pages: int) -> CachedRows:
    """Rows of random pages, no page in two of them; the first row is not meant."""
    width = max(-(-length // size) for length in lengths)
    order = torch.randperm(pages, dtype=torch.int32)[: len(lengths) * width]
    rows = torch.arange(1, len(lengths))
    return CachedRows(order.view(-1, width), torch.tensor(lengths), rows, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_decode_adds_what_its_query_attends_to(
    dtype: torch.dtype, group: int, is_packed: bool
) -> None:
    torch.manual_seed(group)
    size, width = 32, 64
    cached = cached_rows([9, 1, 32, 33, 700], size, 150)
    key = torch.randn(150, size, width).to(dtype)
    key[cached.page_table[1, 0], 1:] = float("nan")
    places = torch.arange(width * size).view(width, size)
    if is_packed:
        places = torch.randperm(width * size).view(width, size)
    pool = torch.empty(150, 2, size * width, dtype=dtype)
    pool[:, 0, places.T.flatten()] = key.flatten(1)
    query = torch.randn(5, group, width).to(dtype)
    before = torch.rand(150, size)
    found, expected = before.clone(), before.clone()
    statistics.add_row_attention(query, key[cached.pages()], cached, 0.125, expected)
    packed = places.int() if is_packed else None
    native.add_row_attention(query, pool, packed, cached, 0.125, found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    drawn = (found - before).sum()
    torch.testing.assert_close(drawn, torch.tensor(4.0 * group), rtol=1e-3, atol=0)


@pytest.mark.parametrize("by_count", [False, True])
@pytest.mark.parametrize(
    "lightest_slots", [statistics.lightest_slots, native.lightest_slots]
)
def test_the_slot_of_the_lightest_token_of_each_row_is_found(
    lightest_slots: Any, by_count: bool
) -> None:
    torch.manual_seed(0)
    cached = cached_rows([9, 60, 32, 700], 32, 100)
    mass = torch.randint(0, 9, (100, 32)).float()
    position = torch.randperm(3200, dtype=torch.int32).view(100, 32)
    own = torch.full((4,), 3300, dtype=torch.int32)
    safe_from = torch.tensor([0, 1500, 2000, 3000])
    found = lightest_slots(cached, mass, position, own, safe_from, by_count)
    for row, slot in zip((1, 2, 3), found.tolist(), strict=True):
        slots = [
            int(cached.page_table[row, token // 32]) * 32 + token % 32
            for token in range(int(cached.lengths[row]))
        ]

        def rank(place: int) -> tuple[float, int]:
            weight, at = mass.view(-1)[place], position.view(-1)[place]
            seen_by = 3300 - at if by_count else 1
            return float(weight / seen_by), int(at)

        old = [place for place in slots if position.view(-1)[place] < safe_from[row]]
        assert slot == min(old, key=rank)


def test_the_lightest_goes_and_of_equal_ones_the_earliest_position() -> None:
    mass = torch.tensor([[3.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    position = torch.tensor([[0, 7, 5, 9, -1], [3, 2, 4, 9, -1]], dtype=torch.int32)
    safe_from = torch.tensor([9, 4])
    assert lightest(mass, position, safe_from).tolist() == [2, 1]


@pytest.fixture
def _uncached() -> Any:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_uncached")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_line_says_so_and_pytorch_stands_in(
    compiler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    query, key = torch.randn(2, 9, 32), torch.randn(1, 9, 32)
    found = [native.attention_mass(query, key, 0.5) for _ in range(2)]
    assert torch.equal(found[1], statistics.attention_mass(query, key, 0.5))
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "CXX" in said


@pytest.mark.usefixtures("_uncached")
def test_the_compiled_object_is_made_once_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path))
    assert native.library() is not None
    (made,) = (tmp_path / "kernels").iterdir()
    native.library.cache_clear()
    written = made.stat().st_mtime_ns
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in made.parent.iterdir()] == [written]
