# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference in float64, on random inputs.

Without a GPU, ``TRITON_INTERPRET=1 pytest tests/kernels`` runs them on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvserve.kernels import reference

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from kvserve.kernels import triton_pages, triton_rows, triton_splits  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The interpreter multiplies bfloat16 matrices as if they were integers.
DTYPES = [dtype for dtype in ERROR if not (INTERPRETED and dtype is torch.bfloat16)]
NAN = float("nan")
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


@dataclass
class Case:
    scale: float
    query: Tensor
    pool: Tensor
    query_start: Tensor
    seq_lens: Tensor
    page_table: Tensor

    def run(self, max_query_len: int, mass: triton_rows.Mass | None = None) -> Tensor:
        out = torch.full_like(self.query, NAN)
        rows = self.query_start, self.seq_lens, self.page_table
        triton_rows.row_attention(
            self.query, self.pool, *rows, self.scale, out, max_query_len, mass
        )
        return out

    def empty_mass(self) -> triton_rows.Mass:
        """Some mass in every slot already, and garbage to work in."""
        pages, _, page_size, _ = self.pool.shape
        scores = self.pool.new_full(
            (pages, page_size, self.query.shape[1]), NAN, dtype=torch.float32
        )
        return triton_rows.Mass(torch.ones_like(scores[..., 0]), scores)

    def wanted_mass(self) -> Tensor:
        drawn = torch.ones(self.pool.shape[0], self.pool.shape[2], device=DEVICE)
        rows = self.query_start, self.seq_lens, self.page_table
        query, pool = self.query.double(), self.pool.double()
        reference.add_row_mass(query, pool, *rows, self.scale, drawn)
        return drawn

    def wanted(self) -> Tensor:
        return reference.row_attention(
            self.query.double(),
            self.pool.double(),
            self.query_start,
            self.seq_lens,
            self.page_table,
            self.scale,
        )


def make_case(
    lengths: list[tuple[int, int]],
    group: int = 4,
    head_size: int = 128,
    page_size: int = 16,
    dtype: torch.dtype = DTYPES[-1],
) -> Case:
    """Random rows on shuffled pages; what no row may read is NaN or page -1. Page 0,
    where masked look-ups end, is never a row's."""
    q_lens, seq_lens = torch.tensor(lengths).unbind(1)
    pages = -(-seq_lens // page_size)
    num_pages = int(pages.sum()) + 3
    pool = torch.full((num_pages, 1, page_size, 2 * head_size), NAN, dtype=dtype)
    page_table = torch.full((len(lengths), int(pages.max()) + 2), -1, dtype=torch.int32)
    order = 1 + torch.randperm(num_pages - 1)[: int(pages.sum())]
    for row, own in enumerate(order.split_with_sizes(pages.tolist())):
        page_table[row, : len(own)] = own
        token = torch.arange(int(seq_lens[row]))
        slots = own[token // page_size] * page_size + token % page_size
        keys, values = torch.randn(2, len(token), head_size).to(dtype)
        reference.write_rows(keys, values, pool, slots)
    query = torch.randn(int(q_lens.sum()), group, head_size).to(dtype)
    query_start = torch.cat([torch.zeros(1), q_lens.cumsum(0)]).int()
    tensors = query, pool, query_start, seq_lens.int(), page_table
    return Case(head_size**-0.5, *(tensor.to(DEVICE) for tensor in tensors))


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def check(case: Case, max_query_len: int) -> None:
    out, wanted = case.run(max_query_len), case.wanted()
    assert relative_error(out, wanted) < ERROR[out.dtype]
    # Norms hide a wrong short row behind many right ones: look at the worst query.
    worst = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=0.05)
    assert worst.max() < 5 * ERROR[out.dtype]


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
