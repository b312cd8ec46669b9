# SPDX-License-Identifier: Apache-2.0
"""A small cache that the GPU's device wrote, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from kvserve.kernels.statistics import CachedRows
from tests.kernels.cases import DEVICE

# After the check that there is something to run Triton.
from kvserve.engine.devices.gpu import TritonDevice  # isort: skip

GROUP, WIDTH, SIZE, PAGES = 3, 64, 32, 40
SCALE = WIDTH**-0.5
LENGTHS = [40, 5, 64, 1, 97]


class Cache:
    """Rows of random keys on random pages, written by the device."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.device = TritonDevice(DEVICE, GROUP)
        self.pool = torch.zeros(PAGES, 1, SIZE, 2 * WIDTH, device=DEVICE)
        self.lengths = torch.tensor(LENGTHS, device=DEVICE)
        width = -(-max(LENGTHS) // SIZE) + 2
        order = 1 + torch.randperm(PAGES - 1)[: len(LENGTHS) * width]
        self.table = order.view(len(LENGTHS), width).int().to(DEVICE)
        self.slots = torch.cat(
            [
                page * SIZE + torch.arange(SIZE, device=DEVICE)
                for page in self.table.long().flatten()
            ]
        )
        self.keys, self.values = torch.randn(2, len(self.slots), WIDTH, device=DEVICE)
        self.device.write(self.keys, self.values, self.pool, self.slots)
        self.query = torch.randn(len(LENGTHS), GROUP, WIDTH, device=DEVICE)

    def rows(self, *which: int) -> CachedRows:
        chosen = torch.tensor(which, device=DEVICE)
        width = -(-max(LENGTHS[row] for row in which) // SIZE)
        return CachedRows(self.table, self.lengths, chosen, SIZE, width)

    def keys_of(self, cached: CachedRows) -> Tensor:
        return self.device.read_keys(self.pool, cached.pages())
