# SPDX-License-Identifier: Apache-2.0
"""Head pages on a GPU: our Triton kernels behind the interface of ``device``.

Nothing here waits for the GPU, and shapes follow from shapes alone, so that CUDA graphs
can capture a decode step. The statistics of prompts are plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvserve.engine.batch.head_major import HeadMajor
from kvserve.engine.batch.rows import RowShapes
from kvserve.engine.devices.device import Device
from kvserve.engine.devices.uploads import upload
from kvserve.kernels import triton_pages, triton_rows
from kvserve.kernels.page_formats import PageFormat
from kvserve.kernels.score_form import Positions, RowScores, ScoreForm
from kvserve.kernels.statistics import CachedRows


@dataclass(frozen=True)
class TritonRows:
    """Rows as the kernels read them.

    Attributes:
        decodes: leading rows that follow the tokens.
        query_start: first query of each row, ``[rows + 1]``, int32; those of the rows
            behind are head-major.
        seq_lens: keys of each row, ``[rows]``, int32.
        most_queries: no row has more; 1 means decode alone.
        first: what a row's first query is of, as ``RowShapes.first``; ``None`` where
            that is ``query_start``.
        gaps: keys that no query of a row sees, ``[rows, 2]`` int32, if any row may.
    """

    decodes: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    most_queries: int
    first: torch.Tensor | None = None
    gaps: torch.Tensor | None = None


class TritonDevice(Device):
    """Writes, reads and attends to pages ``[page_size, 2 * D]``, K before V.

    Args:
        page_format: what pages hold; ``None``: the model's type.
    """

    def __init__(
        self,
        device: torch.device,
        group_size: int,
        page_format: PageFormat | None = None,
    ) -> None:
        self.device = device
        self._group_size = group_size
        self._format = page_format
        self._scores: torch.Tensor | None = None

    def plan_rows(self, shapes: RowShapes) -> TritonRows:
        return TritonRows(
            shapes.num_decodes,
            upload(shapes.query_start, self.device),
            upload(shapes.seq_lens, self.device),
            int(np.diff(shapes.query_start).max(initial=1)),
            upload(shapes.first, self.device),
            None if shapes.gaps is None else upload(shapes.gaps, self.device),
        )

    @property
    def supports_gaps(self) -> bool:
        return True

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        triton_pages.write_rows(key, value, pool, slots, self._format)

    def _read(self, pool: torch.Tensor, pages: torch.Tensor, half: int) -> torch.Tensor:
        if self._format is None:
            return pool[:, 0].chunk(2, dim=-1)[half][pages]
        page_size = pool.shape[2]
        content = pool.view(len(pool), -1).index_select(0, pages.flatten())
        halves = self._format.halves_of_tokens(content, page_size)
        tokens = self._format.read(*halves[half])
        return tokens.view(*pages.shape, page_size, -1)

    def prepare_statistics(self, pool: torch.Tensor) -> None:
        shape = pool.shape[0], pool.shape[2], self._group_size
        self._scores = torch.empty(shape, dtype=torch.float32, device=pool.device)

    def add_row_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        cached: CachedRows,
        scale: float,
        mass: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        # The decode kernel knows what tokens drew, but does not say unless asked, and
        # it was not: some of its rows may be of prompts, which count in another way.
        assert self._scores is not None, "prepare_statistics comes first"
        rows = cached.rows
        chosen = query.index_select(0, rows)
        triton_rows.row_attention(
            chosen,
            pool,
            torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            cached.lengths.index_select(0, rows).int(),
            cached.narrowed_table().index_select(0, rows),
            scale,
            torch.empty_like(chosen),
            max_query_len=1,
            mass=triton_rows.Mass(mass, self._scores),
            page_format=self._format,
            scores=RowScores(form, rows, positions) if form else None,
        )

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: Any,
        page_table: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        first = rows.query_start if rows.first is None else rows.first
        order = HeadMajor(rows.decodes, self._group_size)
        query_rows = order.rows_of(query)
        # Rows that follow the tokens are the output seen otherwise.
        is_decode = rows.decodes == len(rows.seq_lens)
        out_rows = (
            out.view(query_rows.shape) if is_decode else torch.empty_like(query_rows)
        )
        triton_rows.row_attention(
            query_rows,
            pool,
            rows.query_start,
            rows.seq_lens,
            page_table,
            scale,
            out_rows,
            rows.most_queries,
            page_format=self._format,
            scores=RowScores(form, first, positions) if form else None,
            gaps=rows.gaps,
        )
        if not is_decode:
            order.put_back(out_rows, out)
