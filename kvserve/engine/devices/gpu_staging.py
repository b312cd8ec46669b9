# SPDX-License-Identifier: Apache-2.0
"""Brings a step's rows to a GPU.

A decode step reuses memory: a CUDA graph replays kernels with the addresses that they
were captured with, over a batch that is padded to the graph's size. A padding token is
a row that sees nothing and is written nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvserve.engine.batch.rows import StepRows
from kvserve.engine.devices.gpu import TritonDevice, TritonRows
from kvserve.engine.devices.mirror import TableMirror
from kvserve.engine.devices.staging import StagedRows
from kvserve.engine.devices.uploads import Array, Buffer, upload, upload_all
from kvserve.plan.blocks import blocks_of
from kvserve.plan.lanes import IntArray


class DeviceStaging:
    """Copies that nobody waits for, and memory that stays for decode.

    Args:
        mirror: the page tables of decode rows.
        page_size: tokens of a page.
        gaps: rows may have gaps. Those of a decode step then say so whether they do or
            not: a graph that was captured without could not follow.
    """

    def __init__(
        self,
        kernels: TritonDevice,
        mirror: TableMirror,
        page_size: int,
        gaps: bool = False,
    ) -> None:
        self._kernels, self._mirror, self._page_size = kernels, mirror, page_size
        self._device = device = kernels.device
        layers, requests, self._heads, _ = mirror.shape
        self._layers = layers
        rows = requests * self._heads
        self._slots = Buffer(layers * rows, torch.int64, device)
        self._seq_lens = Buffer(layers * rows, torch.int32, device)
        self._gaps = Buffer(layers * rows * 2, torch.int32, device) if gaps else None
        with torch.inference_mode(False):
            self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def stage(self, step: StepRows | None, tokens: int) -> StagedRows:
        if step is not None and isinstance(step.page_tables, list):
            return self._stage_mixed(step, step.page_tables)
        return self._stage_decode(step, tokens)

    def _stage_decode(self, step: StepRows | None, tokens: int) -> StagedRows:
        rows = tokens * self._heads
        slots = np.full((self._layers, rows), -1, dtype=np.int64)
        # Layers have lengths of their own, be they alike: which ones are differs from
        # step to step, and a graph cannot follow.
        seq_lens = np.zeros((self._layers, rows), dtype=np.int32)
        if step is not None:
            asked = _alike(step.slots)
            own = asked.shape[1]
            slots[:, :own] = asked
            by_layer = [step.shapes[shape].seq_lens for shape in step.shape_of_layer]
            seq_lens[:, :own] = by_layer
            longest = int(seq_lens.max(initial=1))
            self._mirror.update(own // self._heads, blocks_of(longest, self._page_size))
        starts, lengths = self._starts[: rows + 1], self._seq_lens.put(seq_lens)
        rows_of = zip(lengths, self._decode_gaps(step, rows), strict=True)
        return StagedRows(
            tokens,
            [TritonRows(rows, starts, lens, 1, gaps=gaps) for lens, gaps in rows_of],
            self._mirror.first_rows(tokens),
            self._slots.put(slots),
        )

    def _decode_gaps(
        self, step: StepRows | None, rows: int
    ) -> Sequence[torch.Tensor | None]:
        """Gaps of each layer's decode rows, ``[layers]`` of ``[rows, 2]``."""
        shapes = step.shapes if step is not None else []
        if self._gaps is None:
            assert all(shape.gaps is None for shape in shapes), "gaps nobody announced"
            return [None] * self._layers
        gaps = np.zeros((self._layers, rows, 2), dtype=np.int32)
        for layer, number in enumerate(step.shape_of_layer if step is not None else []):
            own = shapes[number].gaps
            if own is not None:
                gaps[layer, : len(own)] = own
        return [*self._gaps.put(gaps)]

    def _stage_mixed(self, step: StepRows, tables: list[Array]) -> StagedRows:
        """Rows of a step that reads prompts, which no graph replays."""
        prepared = [self._kernels.plan_rows(shape) for shape in step.shapes]
        longest = max(int(shape.seq_lens.max()) for shape in step.shapes)
        width = blocks_of(longest, self._page_size)
        sources, targets = zip(*step.copies, strict=True) if step.copies else ((), ())
        pairs = zip(self.tensors(sources), self.tensors(targets), strict=True)
        return StagedRows(
            step.num_decode_tokens,
            [prepared[shape] for shape in step.shape_of_layer],
            self.tensors([table[:, :width] for table in tables]),
            self.tensor(_alike(step.slots)),
            list(pairs),
        )

    def tensors(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        return upload_all(arrays, self._device)

    def tensor(self, array: Array) -> torch.Tensor:
        return upload(array, self._device)


def _alike(slots: IntArray | list[IntArray]) -> IntArray:
    assert not isinstance(slots, list), "layers with unequal heads are refused on GPUs"
    return slots
