# SPDX-License-Identifier: Apache-2.0
"""Pools whose pages are full of traps, for tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kvserve.kernels.page_formats import FORMATS, PageFormat, plain

FLOAT32 = plain(torch.float32)
STORED = {FLOAT32.name: FLOAT32, **FORMATS}
"""Every type that a page may have, by name."""


def trapped_pool(
    kind: PageFormat, pages: int, page_size: int, head_size: int
) -> Tensor:
    """Make a pool whose every number, and every scale, is NaN or all ones."""
    shape = kind.pool_shape(pages, page_size, head_size)
    pool = torch.empty(shape, dtype=kind.pool)
    pool.view(torch.uint8).fill_(0xFF)
    return pool


def put_on_page(
    kind: PageFormat, page: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ``[n, d]`` keys and values to ``page [1, page_size, w]``.

    Returns:
        What attention must take them for.
    """
    size, width = page.shape[1], keys.shape[1]
    whole = page.view(-1)
    numbers = whole[: 2 * size * width].view(kind.number).view(2, -1)
    halves = numbers[0].view(width, size).T, numbers[1].view(size, width)
    scales = whole[2 * size * width :].view(torch.float32).view(-1, size)
    for half, tokens in enumerate((keys, values)):
        stored, scale = kind.stored(tokens)
        halves[half][: len(tokens)] = stored
        if scale is not None:
            scales[half, : len(tokens)] = scale[:, 0]
    return kind.round_trip(keys), kind.round_trip(values)
