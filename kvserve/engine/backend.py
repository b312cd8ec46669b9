# SPDX-License-Identifier: Apache-2.0
"""The attention backend: vLLM's hook for metadata and for the attention itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from kvserve.engine.device import CPUDevice, Device
from kvserve.engine.page_tables import PageTables
from kvserve.engine.rows import RowBuilder
from kvserve.engine.spec import HeadPagedSpec


@dataclass
class HeadPagedMetadata:
    """One step's rows, on the device.

    Attributes:
        num_actual_tokens: tokens of the step without padding.
        num_decode_tokens: leading tokens whose rows follow the tokens.
        rows: what the device prepared, of each layer ``[num_layers]``.
        page_tables: of each layer's rows, ``[num_layers]`` of ``[rows, width]``.
        slots: where keys and values go, ``[num_layers, tokens * H_kv]``.
        copies: pages to move when a layer is done, ``[num_layers]`` or empty.
    """

    num_actual_tokens: int
    num_decode_tokens: int
    rows: list[Any]
    page_tables: torch.Tensor | list[torch.Tensor]
    slots: torch.Tensor
    copies: list[tuple[torch.Tensor, torch.Tensor]]


class HeadPagedBackend(CPUAttentionBackend):
    """Stands in for ``CPU_ATTN``, the one backend that vLLM's CPU platform asks for."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        return HeadPagedImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return HeadPagedMetadataBuilder


class HeadPagedMetadataBuilder(AttentionMetadataBuilder[HeadPagedMetadata]):
    """Builds the rows of each step; the worker attaches the batch they come from."""

    def __init__(
        self,
        kv_cache_spec: HeadPagedSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # One-token requests come first: their rows are a view of the queries.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        group_size = model.get_num_attention_heads(parallel)
        group_size //= model.get_num_kv_heads(parallel)
        self.device_ops: Device = CPUDevice(
            kv_cache_spec.dtype,
            group_size,
            kv_cache_spec.head_size,
            kv_cache_spec.block_size,
        )
        self.tables = PageTables(
            kv_cache_spec.plan,
            vllm_config.scheduler_config.max_num_seqs,
            model.max_model_len,
        )
        self._rows = RowBuilder(kv_cache_spec.plan, self.tables)
        self._input_batch: Any = None

    def attach(self, input_batch: Any) -> None:
        """Name the runner's batch, which holds request ids and their page lists."""
        self._input_batch = input_batch

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadPagedMetadata:
        del common_prefix_len, fast_build
        common = common_attn_metadata
        seq_lens = common.seq_lens.numpy().astype(np.int64)
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        requests: Sequence[str] = self._input_batch.req_ids
        self.tables.refresh(
            requests[: common.num_reqs], common.block_table_tensor.numpy(), seq_lens
        )
        step = self._rows.build(query_start, seq_lens)
        prepared = [self.device_ops.plan_rows(shape) for shape in step.shapes]
        tables = step.page_tables
        return HeadPagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=step.num_decode_tokens,
            rows=[prepared[shape] for shape in self._rows.shape_of_layer],
            page_tables=(
                [torch.from_numpy(table) for table in tables]
                if isinstance(tables, list)
                else torch.from_numpy(tables)
            ),
            slots=torch.from_numpy(step.slots),
            copies=[
                (torch.from_numpy(source), torch.from_numpy(target))
                for source, target in step.copies
            ],
        )


class HeadPagedImpl(CPUAttentionBackendImpl):
    """Attention of one layer over head pages."""

    device_ops: Device
    layer_index: int

    def bind(self, device_ops: Device, layer_index: int) -> None:
        """Tell the layer its number and its device, once the cache exists."""
        self.device_ops = device_ops
        self.layer_index = layer_index

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
            query: ``[tokens, H_q, D]``; ``key`` and ``value``: ``[tokens, H_kv, D]``.
            kv_cache: the pool, ``[num_pages, 1, page_size, 2 * D]``.
            output: ``[tokens, H_q, D]``, written in place.
        """
        if attn_metadata is None:  # a profiling run
            return output
        meta, this = attn_metadata, self.layer_index
        tokens, width = meta.num_actual_tokens, self.head_size
        self.device_ops.write(
            key[:tokens].reshape(-1, width),
            value[:tokens].reshape(-1, width),
            kv_cache,
            meta.slots[this],
        )
        query_rows = self._to_rows(query[:tokens], meta.num_decode_tokens)
        only_decode = meta.num_decode_tokens == tokens
        output_rows = (
            output[:tokens].view(query_rows.shape)
            if only_decode
            else torch.empty_like(query_rows)
        )
        self.device_ops.attend(
            query_rows,
            kv_cache,
            meta.rows[this],
            meta.page_tables[this],
            self.scale,
            output_rows,
        )
        if not only_decode:
            self._from_rows(output_rows, output[:tokens], meta.num_decode_tokens)
        if meta.copies and len(meta.copies[this][0]):
            source, target = meta.copies[this]
            kv_cache[target] = kv_cache[source]
        return output

    def _to_rows(self, query: torch.Tensor, num_decodes: int) -> torch.Tensor:
        """Lay queries out as rows want them, ``[tokens * H_kv, G, D]``."""
        group, width = self.num_queries_per_kv, self.head_size
        if num_decodes == len(query):
            return query.reshape(-1, group, width)
        decode, prefill = query[:num_decodes], query[num_decodes:]
        head_major = prefill.unflatten(1, (self.num_kv_heads, group)).transpose(0, 1)
        return torch.cat(
            [decode.reshape(-1, group, width), head_major.reshape(-1, group, width)]
        )

    def _from_rows(
        self, rows: torch.Tensor, output: torch.Tensor, num_decodes: int
    ) -> None:
        decode_rows = num_decodes * self.num_kv_heads
        output[:num_decodes] = rows[:decode_rows].view(output[:num_decodes].shape)
        head_major = rows[decode_rows:].unflatten(0, (self.num_kv_heads, -1))
        prefill = output[num_decodes:].unflatten(
            1, (self.num_kv_heads, self.num_queries_per_kv)
        )
        prefill.copy_(head_major.transpose(0, 1))
