# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer over head pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionType,
)

from kvserve.engine.clock import Clock
from kvserve.engine.devices.device import Device
from kvserve.engine.worker.selection import SelectingStep
from kvserve.engine.worker.thinning import ThinningStep
from kvserve.errors import UserError
from kvserve.kernels.score_form import Positions, ScoreForm


@dataclass
class HeadPagedMetadata(AttentionMetadata):
    """One step's rows, on the device.

    Attributes:
        num_actual_tokens: tokens of the step without padding.
        num_decode_tokens: leading tokens whose rows follow the tokens.
        rows: what the device prepared, of each layer ``[num_layers]``.
        page_tables: of each layer's rows, ``[num_layers]`` of ``[rows, width]``.
        slots: where keys and values go, ``[num_layers, tokens * H_kv]``.
        copies: pages to move when a layer is done, ``[num_layers]`` or empty.
        clock: what choosing and moving cost.
        selecting: what requests that select do in this step, if there are any.
        thinning: groups that leave the window in this step, if there are any.
        positions: of tokens and of the pool, if a layer asks how far keys are.
    """

    num_actual_tokens: int
    num_decode_tokens: int
    rows: list[Any]
    page_tables: torch.Tensor | list[torch.Tensor]
    slots: torch.Tensor | list[torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]]
    clock: Clock
    selecting: SelectingStep | None = None
    thinning: ThinningStep | None = None
    positions: Positions | None = None


class HeadPagedAttention(AttentionImpl[HeadPagedMetadata]):
    """Writes keys and values to head pages and attends to them, row by row."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self._num_kv_heads = num_kv_heads or num_heads
        self.group_size = num_heads // self._num_kv_heads
        self._window, self._soft_cap = sliding_window or 0, logits_soft_cap or 0.0
        self._sinks, self._slopes = sinks, alibi_slopes
        self._layer_index, self._writes, self._is_last = 0, True, True
        self._page_numbers = head_size

    @property
    def asks_distance(self) -> bool:
        """Whether scores follow from how far keys are."""
        return bool(self._slopes)

    def read_lanes(
        self, layer_index: int, writes: bool, is_last: bool, largest_head: int
    ) -> None:
        """Tell a layer whose lanes it reads.

        Args:
            layer_index: among layers with a cache of their own.
            writes: whether they are its own.
            is_last: whether no later layer reads them.
            largest_head: numbers of a head that a page has room for.
        """
        self._layer_index, self._writes, self._is_last = layer_index, writes, is_last
        self._page_numbers = largest_head

    @property
    def shape(self) -> tuple[int, int]:
        """Query heads that share a KV head, and numbers of a head."""
        return self.group_size, self.head_size

    def bind(self, device: Device, place: torch.device) -> None:
        """Tell the layer its device, once weights are loaded.

        Raises:
            UserError: its kernels do not score as the layer does.
        """
        self._device = device
        sinks, slopes = self._sinks, None
        if sinks is not None:
            sinks = sinks.detach().to(place, torch.float32).contiguous()
        if self._slopes:
            slopes = torch.tensor(self._slopes, dtype=torch.float32, device=place)
        self._form = ScoreForm(self._soft_cap, sinks, slopes, self._window)
        if not device.supports(self._form):
            raise UserError(
                "MODEL: its layers have sinks or slopes, which the kernel that serves "
                "this type, head size and processor does not take page by page; try "
                "--dtype float32, or stock vLLM (`--policy none`)"
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HeadPagedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's keys and values, attend, settle what survives.

        Args:
            query: ``[tokens, H_q, D]``; ``key`` and ``value``: ``[tokens, H_kv, D]``,
                unless the layer reads another's.
            kv_cache: the pool, ``[num_pages, 1, page_size, 2 * D]``.
            output: ``[tokens, H_q, D]``, written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization over head pages")
        if attn_metadata is None:  # a profiling run
            return output
        meta, this = attn_metadata, self._layer_index
        pages = self._pages(kv_cache)
        tokens, width = meta.num_actual_tokens, self.head_size
        if self._writes:
            self._write(
                key[:tokens].reshape(-1, width),
                value[:tokens].reshape(-1, width),
                pages,
                meta,
            )
            if meta.thinning is not None:
                cached = meta.positions.cached if meta.positions else None
                meta.thinning.thin(this, kv_cache, cached)
        self._device.attend(
            query[:tokens],
            pages,
            meta.rows[this],
            meta.page_tables[this],
            self.scale,
            output[:tokens],
            self._form,
            meta.positions,
        )
        if self._is_last and meta.copies:
            self._leave_scratch(kv_cache, meta)
        if meta.selecting is not None and self._writes:
            asked = query[:tokens], kv_cache, self.scale, self._form
            meta.selecting.observe(this, *asked, meta.positions)
        return output

    def _leave_scratch(self, pool: torch.Tensor, meta: HeadPagedMetadata) -> None:
        """Move pages that wait in scratch to where they stay."""
        source, target = meta.copies[self._layer_index]
        if not len(source):
            return
        with meta.clock.compacting():
            pool[target] = pool[source]
            if meta.positions is not None:
                cached = meta.positions.cached
                cached[target] = cached[source]

    def _pages(self, pool: torch.Tensor) -> torch.Tensor:
        """View a pool for larger heads as one of this layer's, of more pages."""
        page_size, numbers = pool.shape[2:]
        per_page = self._page_numbers // self.head_size
        if per_page <= 1:
            return pool
        return pool.view(-1, 1, page_size, numbers // per_page)

    def _write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: HeadPagedMetadata,
    ) -> None:
        """Store this step's keys and values, ``[tokens * H_kv, D]``."""
        slots = meta.slots[self._layer_index]
        if meta.selecting is not None:
            meta.selecting.make_room(self._layer_index, slots)
        self._device.write(key, value, kv_cache, slots)
        if meta.positions is not None:
            own = meta.positions.own.repeat_interleave(self._num_kv_heads)
            meta.positions.cached.view(-1)[slots] = own
        if meta.selecting is not None:
            meta.selecting.written(slots)
