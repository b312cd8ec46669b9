# SPDX-License-Identifier: Apache-2.0
"""What every device must do with pages that lie here and there in a pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvserve.engine.devices.device import Device
from kvserve.kernels.statistics import CachedRows, row_attention

AsRead = Callable[[Tensor], Tensor]
"""What pages give back of the tokens ``[..., d]`` that were written."""


def check_round_trip(
    device: Device, pool: Tensor, keys: Tensor, values: Tensor, as_read: AsRead
) -> None:
    """Write three pages of tokens ``[3 * page_size, d]`` and read them.

    Args:
        pool: has at least six pages.
    """
    page_size, width = len(keys) // 3, keys.shape[1]
    pages = torch.tensor([[2], [5], [1]])
    slots = (pages * page_size + torch.arange(page_size)).flatten()
    device.write(keys, values, pool, slots)
    for found, given in (
        (device.read_keys(pool, pages), keys),
        (device.read_values(pool, pages), values),
    ):
        assert found.shape == (3, 1, page_size, width)
        assert torch.equal(found.reshape(given.shape), as_read(given))


def check_mass(
    device: Device, pool: Tensor, keys: Tensor, query: Tensor, as_read: AsRead
) -> None:
    """Add the attention of two rows to what tokens of three pages of 32 have drawn.

    Args:
        pool: has nine pages.
        keys: ``[96, d]``, of which the first row has 40 and the second five.
        query: ``[2, G, d]``.
    """
    table = torch.tensor([[7, 2], [4, 0]], dtype=torch.int32)
    slots = torch.cat([page * 32 + torch.arange(32) for page in (7, 2, 4)])
    device.write(keys, keys, pool, slots)
    mass, expected = torch.ones(9, 32), torch.ones(9 * 32)
    cached = CachedRows(table, torch.tensor([40, 5]), torch.arange(2), page_size=32)
    device.add_row_attention(query, pool, cached, 0.125, mass)
    for row, (first, length) in enumerate(((0, 40), (64, 5))):
        seen = slice(first, first + length)
        tokens, whole = as_read(keys[None, seen]), torch.tensor([length])
        drawn = row_attention(query[row, None], tokens, whole, 0.125)
        expected[slots[seen]] += drawn[0]
    torch.testing.assert_close(mass.flatten(), expected, rtol=1e-5, atol=1e-6)
