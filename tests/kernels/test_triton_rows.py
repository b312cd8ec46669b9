# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference in float64, on random inputs.

Without a GPU, ``TRITON_INTERPRET=1 pytest tests/kernels`` runs them on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from kvserve.kernels import reference
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    ERROR,
    INTERPRETED,
    NAN,
    Case,
    check_attention,
    make_case,
    relative_error,
)

# After the check that there is something to run Triton.
import triton.language as tl  # isort: skip
from kvserve.kernels import triton_pages, triton_rows, triton_splits  # isort: skip

pytestmark = pytest.mark.gpu
# (queries, keys) of each row: decode, empty, bounded blocks, a long chunk; lengths at,
# just below and just above page and tile edges; more queries than keys.
# The interpreter takes seconds for chunks of more tiles, which differ in number alone.
CHUNK = 70 if INTERPRETED else 200
MIXED = [
    (1, 1), (1, 2500), (0, 300), (32, 544), (0, 0), (CHUNK, CHUNK + 1), (1, 64),
    (64, 64), (2, 65), (1, 0), (5, 3), (33, 127), (1, 769), (CHUNK - 5, 900), (1, 1024),
    (1, 4099),
]  # fmt: skip
DECODE = [row for row in MIXED if row[0] < 2]


def check(case: Case, max_query_len: int) -> None:
    check_attention(case.run(max_query_len), case.wanted())


@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
class TestRowAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
    def test_types_and_head_sizes(
        self, lengths: list[tuple[int, int]], dtype: torch.dtype, head_size: int
    ) -> None:
        torch.manual_seed(head_size)
        case = make_case(lengths, dtype=dtype, head_size=head_size)
        check(case, max(lengths)[0])

    @pytest.mark.parametrize("page_size", [16, 32, 64])
    @pytest.mark.parametrize("group", [1, 3, 4, 8])
    def test_groups_and_page_sizes(
        self, lengths: list[tuple[int, int]], group: int, page_size: int
    ) -> None:
        torch.manual_seed(group)
        case = make_case(lengths, group=group, page_size=page_size)
        check(case, max(lengths)[0])


@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode_adds_what_each_cached_token_draws(
    lengths: list[tuple[int, int]], group: int
) -> None:
    torch.manual_seed(group)
    case = make_case(lengths, group=group, head_size=64, page_size=32)
    mass = case.empty_mass()
    plain = case.run(max(lengths)[0])
    assert torch.equal(case.run(max(lengths)[0], mass), plain)
    wanted = case.wanted_mass()
    assert (mass.drawn - wanted).abs().max() < ERROR[plain.dtype]
    # A row of one query draws as much as it has heads.
    rows = sum(1 for queries, keys in lengths if queries == 1 and keys)
    total = float((mass.drawn - 1).sum())
    assert total == pytest.approx(rows * group, rel=1e-3)


def test_more_rows_than_a_program_looks_at_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    if INTERPRETED:
        # A program takes a millisecond there, and is one of thousands for 1100 rows.
        monkeypatch.setattr(triton_splits, "ROWS_AT_ONCE", tl.constexpr(64))
    rows = triton_splits.ROWS_AT_ONCE.value + 76
    lengths = [(row % 3, 40 + row % 7) for row in range(rows)]
    lengths[-10] = (1, 3000)
    check(make_case(lengths, group=1, head_size=64), max_query_len=2)


def test_more_splits_than_are_joined_at_once() -> None:
    torch.manual_seed(7)
    # Sixteen heads: the highest score of some is in the last splits.
    check(make_case([(1, 20_000)], group=16, head_size=64), max_query_len=1)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_long_rows() -> None:
    torch.manual_seed(2)
    lengths = [(1, 131_072), (4096, 6000), *[(1, 512)] * 300, *[(64, 576)] * 100]
    check(make_case(lengths), max_query_len=4096)


def test_queries_past_the_last_row_are_left_alone() -> None:
    torch.manual_seed(3)
    case = make_case([(1, 100), (4, 50), (1, 9)])
    case.query_start[-1] -= 1
    out = case.run(max_query_len=4)
    assert out[-1].isnan().all()
    assert relative_error(out[:-1], case.wanted()[:-1]) < ERROR[out.dtype]


def test_no_rows() -> None:
    empty = torch.empty(0, 4, 64, device=DEVICE)
    pool = torch.empty(2, 1, 16, 128, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    triton_rows.row_attention(
        empty, pool, index, index[:0], index[:0, None], 1.0, empty, max_query_len=1
    )
    triton_pages.write_rows(empty[:, 0], empty[:, 0], pool, index[:0].long())
    triton_pages.copy_pages(pool, index[:0].long(), index[:0].long())


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_decode_with_other_lengths() -> None:
    torch.manual_seed(4)
    case = make_case(DECODE)
    first = case.run(max_query_len=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(max_query_len=1)
    graph.replay()
    assert torch.equal(out, first)
    case.query.normal_()
    case.seq_lens.sub_(7).clamp_(min=0)
    out.fill_(NAN)
    graph.replay()
    assert relative_error(out, case.wanted()) < ERROR[out.dtype]


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_write_rows(dtype: torch.dtype, head_size: int) -> None:
    torch.manual_seed(5)
    pool = torch.randn(9, 1, 32, 2 * head_size, device=DEVICE).to(dtype)
    wanted = pool.clone()
    # Slices of one wider tensor, as a fused QKV projection leaves them.
    fused = torch.randn(100, 3 * head_size, device=DEVICE).to(dtype)
    key, value = fused[:, :head_size], fused[:, -head_size:]
    slots = torch.randperm(9 * 32, device=DEVICE)[:100]
    slots[::7] = -1
    triton_pages.write_rows(key, value, pool, slots)
    reference.write_rows(key, value, wanted, slots)
    assert torch.equal(pool, wanted)


@pytest.mark.parametrize("page_size", [16, 64])
def test_copy_pages(page_size: int) -> None:
    torch.manual_seed(6)
    pool = torch.randn(40, 1, page_size, 160, device=DEVICE).bfloat16()
    wanted = pool.clone()
    source, target = torch.randperm(40, device=DEVICE)[:30].view(2, 15)
    triton_pages.copy_pages(pool, source, target)
    reference.copy_pages(wanted, source, target)
    assert torch.equal(pool, wanted)
