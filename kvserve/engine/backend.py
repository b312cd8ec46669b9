# SPDX-License-Identifier: Apache-2.0
"""The attention backend: vLLM's hook for metadata and for the attention itself."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvserve.engine.attention import HeadPagedAttention, HeadPagedMetadata
from kvserve.engine.clock import Clock
from kvserve.engine.device import PAGE_SIZE, CPUDevice, Device
from kvserve.engine.page_tables import PageTables
from kvserve.engine.rows import RowBuilder
from kvserve.engine.spec import HeadPagedSpec
from kvserve.plan import StreamRule


class HeadPagedBackend(AttentionBackend):
    """Stands in for ``CPU_ATTN``, the one backend that vLLM's CPU platform asks for."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[HeadPagedAttention]:
        return HeadPagedAttention

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
        self.kernels: Device = CPUDevice(
            kv_cache_spec.dtype,
            group_size,
            kv_cache_spec.head_size,
            kv_cache_spec.block_size,
        )
        self.clock = Clock()
        self.tables, self._rows = self._make_tables(vllm_config)
        self._input_batch: Any = None

    def _make_tables(self, vllm_config: VllmConfig) -> tuple[PageTables, RowBuilder]:
        spec = cast(HeadPagedSpec, self.kv_cache_spec)
        rule = cast(StreamRule, spec.rule)
        rank = get_tensor_model_parallel_rank()
        tables = PageTables(
            spec.plan,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            rule if rule.is_elastic else None,
            rank,
        )
        return tables, RowBuilder(spec.plan.by_rank[rank], tables)

    def attach(self, input_batch: Any) -> None:
        """Name the runner's batch, which holds request ids and their page lists."""
        self._input_batch = input_batch

    def _requests(self, common: CommonAttentionMetadata) -> list[str]:
        requests: list[str] = self._input_batch.req_ids[: common.num_reqs]
        return requests

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadPagedMetadata:
        common = common_attn_metadata
        seq_lens = common.seq_lens.numpy().astype(np.int64)
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        requests = self._requests(common)
        self.tables.refresh(requests, common.block_table_tensor.numpy(), seq_lens)
        step = self._rows.build(query_start, seq_lens)
        prepared = [self.kernels.plan_rows(shape) for shape in step.shapes]
        tables = step.page_tables
        return HeadPagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=step.num_decode_tokens,
            rows=[prepared[shape] for shape in step.shape_of_layer],
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
            clock=self.clock,
        )
