# SPDX-License-Identifier: Apache-2.0
"""Page tables of decode rows on a GPU, kept up to date row by row.

All tables together are hundreds of megabytes on a large server; a step changes those
of the requests that opened a block.
"""

from __future__ import annotations

import torch

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.devices.uploads import upload


class TableMirror:
    """What ``tables.ordered`` holds, where kernels read it."""

    def __init__(self, tables: PageTables, device: torch.device) -> None:
        self._tables = tables
        with torch.inference_mode(False):
            self._mirror = torch.zeros(
                tables.ordered.shape, dtype=torch.int32, device=device
            )

    @property
    def shape(self) -> torch.Size:
        """``[num_layers, rows, num_kv_heads, width]``."""
        return self._mirror.shape

    def update(self, requests: int, width: int) -> None:
        """Copy what has changed.

        Args:
            requests: rows of the batch; of others nothing is known.
            width: pages that the longest row reads.
        """
        changed = self._tables.changed
        # A row beyond the batch is laid out anew when a request moves there.
        rows = sorted(row for row in changed if row < requests)
        changed.clear()
        if not rows:
            return
        pages = upload(self._tables.ordered[:, rows, :, :width], self._mirror.device)
        for place, row in enumerate(rows):
            self._mirror[:, row, :, :width].copy_(pages[:, place])

    def first_rows(self, requests: int) -> torch.Tensor:
        """Tables of each layer's decode rows, ``[num_layers, rows, width]``."""
        layers, _, _, width = self._mirror.shape
        return self._mirror[:, :requests].reshape(layers, -1, width)
