# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: N803
"""How numbers lie in head pages on a GPU; writing and copying pages, in Triton.

The pool is contiguous ``[num_pages, 1, page_size, 2 * D]``, where ``D`` is the head
size; a token's K is ``pool[p, 0, t, :D]`` and its V, right behind it,
``pool[p, 0, t, D:]``. With a ``page_format`` the pool is ``page_format.pool_shape``
instead: a page's numbers lie in the same order, and behind them the scales of its keys
and of its values.

No call waits for the GPU, and every grid depends on shapes alone: CUDA graphs can
capture them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvserve.kernels.page_formats import LEAST_SCALE, PageFormat

WRITES_AT_ONCE = 16
COPY_AT_ONCE = 4096


@dataclass(frozen=True)
class Pages:
    """A pool as kernels read it.

    Attributes:
        numbers: the pool, of the type of its numbers.
        scales: the same memory in float32, where pages have scales.
        page_size: tokens of a page.
        constants: what kernels are compiled for.
    """

    numbers: Tensor
    scales: Tensor
    page_size: int
    constants: dict[str, int]

    @classmethod
    def of(cls, pool: Tensor, page_format: PageFormat | None, like: Tensor) -> Pages:
        """Check that ``pool`` holds heads of ``like [..., D]``, and name its parts."""
        head_size = like.shape[-1]
        assert pool.is_contiguous()
        numbers = scales = pool
        if page_format is None:
            assert like.dtype == pool.dtype
            assert pool.shape[-1] == 2 * head_size
        else:
            shape = page_format.pool_shape(pool.shape[0], pool.shape[2], head_size)
            assert pool.dtype == page_format.pool
            assert pool.shape == shape
            numbers = pool.view(page_format.number)
            if page_format.is_scaled:
                scales = pool.view(torch.float32)
        constants = {
            "HEAD_SIZE": head_size,
            "HEAD_PAD": triton.next_power_of_2(head_size),
            "PAGE_SIZE": pool.shape[2],
            "PAGE_STRIDE": pool.shape[2] * pool.shape[3],
            "SCALED": int(page_format is not None and page_format.is_scaled),
        }
        return cls(numbers, scales, pool.shape[2], constants)


def write_rows(
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slots: Tensor,
    page_format: PageFormat | None = None,
) -> None:
    """Scatter the K and V of ``n`` (token, KV head) pairs into their slots.

    Args:
        key, value: ``[n, D]`` of the pool's type, or of any if there is a
            ``page_format``; vectors contiguous, any row stride.
        pool: ``[num_pages, 1, page_size, 2 * D]`` contiguous, or as ``page_format``
            says; written in place.
        slots: ``[n]`` int64, ``page * page_size + offset``; a negative one is skipped.
        page_format: how numbers are stored; ``None``: as they are.
    """
    pages = Pages.of(pool, page_format, key)
    assert key.dtype == value.dtype
    assert key.shape == value.shape
    assert len(slots) >= len(key)
    assert key.stride(1) == value.stride(1) == slots.stride(0) == 1
    n = len(key)
    if n == 0:
        return
    if not pages.constants["SCALED"]:
        key, value = key.to(pool.dtype), value.to(pool.dtype)
    _write_kernel[(triton.cdiv(n, WRITES_AT_ONCE),)](
        key, value, pages.numbers, pages.scales, slots,
        n, key.stride(0), value.stride(0), **pages.constants,
        GREATEST=page_format.greatest if page_format else 0.0, LEAST_SCALE=LEAST_SCALE,
        AT_ONCE=WRITES_AT_ONCE,
    )  # fmt: skip


@triton.jit
def _store_token(  # type: ignore[no-untyped-def]
    token,
    numbers,
    scales,
    wanted,
    GREATEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    """Store ``token [n, HEAD_PAD]`` where ``wanted``, scaled if GREATEST is not 0.

    ``PageFormat.stored`` says the same.
    """
    if GREATEST == 0:
        tl.store(numbers, token, mask=wanted)
    else:
        kind: tl.constexpr = numbers.dtype.element_ty
        token = token.to(tl.float32)
        scale = tl.math.div_rn(tl.max(tl.abs(token), 1), GREATEST)
        scale = tl.maximum(scale, LEAST_SCALE)
        token = tl.math.div_rn(token, tl.broadcast_to(scale[:, None], token.shape))
        # Beside so large a number no more digits are left than are wanted, and ties go
        # to even: of int8 none behind the point, of e4m3 three behind the leading one.
        large = 12582912.0
        if kind == tl.float8e4nv:
            power = token.to(tl.int32, bitcast=True) & 0x7F800000
            power = tl.maximum(power.to(tl.float32, bitcast=True), 0.015625)
            large = power * 1572864.0  # below 2^-6 all have the same last digit
        token = (token + large) - large
        token = tl.minimum(tl.maximum(token, -GREATEST), GREATEST)
        tl.store(numbers, token.to(kind), mask=wanted)
        tl.store(scales, scale, mask=tl.max(wanted.to(tl.int32), 1) > 0)


@triton.jit(do_not_specialize=["n"])
def _write_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    pool,
    scales,
    slots,
    n,
    key_stride,
    value_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    GREATEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The K and V of ``AT_ONCE`` (token, KV head) pairs."""
    pair = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    dim = tl.arange(0, HEAD_PAD)
    slot = tl.load(slots + pair, mask=pair < n, other=-1)
    wanted = (slot >= 0)[:, None] & (dim < HEAD_SIZE)[None, :]
    page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
    from_ = pair.to(tl.int64)[:, None]
    to = pool + (page * PAGE_STRIDE + place * (2 * HEAD_SIZE))[:, None] + dim[None, :]
    own = scales
    if SCALED:
        own += page * (PAGE_STRIDE // 4) + PAGE_SIZE * 2 * HEAD_SIZE // 4 + place
    k = tl.load(key + from_ * key_stride + dim[None, :], mask=wanted, other=0.0)
    v = tl.load(value + from_ * value_stride + dim[None, :], mask=wanted, other=0.0)
    _store_token(k, to, own, wanted, GREATEST, LEAST_SCALE)
    _store_token(v, to + HEAD_SIZE, own + PAGE_SIZE, wanted, GREATEST, LEAST_SCALE)


def copy_pages(pool: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy page ``source[i]`` to page ``target[i]``.

    Args:
        pool: ``[num_pages, 1, page_size, w]`` contiguous, written in place.
        source, target: ``[n]`` int64, with no page in common.
    """
    assert all(tensor.is_contiguous() for tensor in (pool, source, target))
    n, size = source.numel(), pool[0].numel()
    if n == 0:
        return
    _copy_kernel[(n, triton.cdiv(size, COPY_AT_ONCE))](
        pool, source, target, SIZE=size, AT_ONCE=COPY_AT_ONCE
    )


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    pool, source, target, SIZE: tl.constexpr, AT_ONCE: tl.constexpr
):
    """``AT_ONCE`` of a page's ``SIZE`` numbers."""
    from_ = tl.load(source + tl.program_id(0)) * SIZE
    to = tl.load(target + tl.program_id(0)) * SIZE
    number = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    page_part = tl.load(pool + from_ + number, mask=number < SIZE)
    tl.store(pool + to + number, page_part, mask=number < SIZE)
