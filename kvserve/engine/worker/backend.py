# SPDX-License-Identifier: Apache-2.0
"""The attention backend: vLLM's hook for metadata and for the attention itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.cache import CacheDType
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.batch.rows import RowBuilder
from kvserve.engine.clock import Clock
from kvserve.engine.devices import hardware
from kvserve.engine.devices.cpu import PAGE_SIZE
from kvserve.engine.devices.staging import StagedRows
from kvserve.engine.spec import HeadPagedSpec
from kvserve.engine.start.support import page_format_of
from kvserve.engine.worker.attention import HeadPagedAttention, HeadPagedMetadata
from kvserve.engine.worker.rotation import Rotation
from kvserve.engine.worker.selection import (
    SelectingStep,
    Selector,
    TokenState,
    positions_of,
)
from kvserve.engine.worker.thinning import Thinner
from kvserve.kernels.page_formats import FORMATS
from kvserve.kernels.score_form import Positions
from kvserve.plan.lanes import IntArray, PageArray
from policies.thinning import ThinningPolicy


class HeadPagedBackend(AttentionBackend):
    """Stands in for the backend of ``hardware.attention_slot``, and bears its name."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        *cast(list[CacheDType], FORMATS),
    ]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return hardware.attention_slot().name

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE)]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)  # what Triton takes

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

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        # A step of single tokens may end a prompt, which a graph would not notice;
        # and positions have no address of their own.
        rule = cast(HeadPagedSpec, kv_cache_spec).rule
        thins = isinstance(rule.policy, ThinningPolicy)
        asks = any(impl.asks_distance for impl in _impls(vllm_config))
        if rule.may_select or thins or asks:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

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
        layers = _impls(vllm_config)
        self.clock = Clock()
        rule, rank = kv_cache_spec.rule, get_tensor_model_parallel_rank()
        self.tables = PageTables(
            kv_cache_spec.plan,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            rule if rule.is_elastic else None,
            rank,
        )
        self._rows = RowBuilder(kv_cache_spec.plan.of_rank(rank), self.tables)
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)
        largest = max(layers, key=lambda layer: layer.head_size)
        self.kernels, self.staging = hardware.kernels_and_staging(
            kv_cache_spec,
            page_format_of(vllm_config),
            dtype,
            largest.group_size,
            self.tables,
            device,
            gaps=self.tables.thins,
        )
        self._input_batch: Any = None
        self._selector: Selector | None = None
        self._thinner: Thinner | None = None
        self._asks_distance = any(layer.asks_distance for layer in layers)
        self._cached_positions: torch.Tensor | None = None
        # Here, not when the cache is there: vLLM profiles CUDA graphs before that.
        by_shape = {largest.shape: self.kernels}
        for layer in layers:
            if layer.shape not in by_shape:
                shape = *layer.shape, kv_cache_spec.block_size
                by_shape[layer.shape] = hardware.cpu_kernels(
                    None, dtype, *shape, gaps=self.tables.thins
                )
            layer.bind(by_shape[layer.shape], device)

    def attach(self, input_batch: Any) -> None:
        """Name the runner's batch, which holds request ids and their page lists."""
        self._input_batch = input_batch

    def remember_tokens(self, pool: torch.Tensor) -> None:
        """Make room for what must be known of cached tokens beside keys and values."""
        rule = cast(HeadPagedSpec, self.kv_cache_spec).rule
        if not rule.may_select and not self._asks_distance:
            return
        shape = pool.shape[0], pool.shape[2]
        self._cached_positions = torch.full(
            shape, -1, dtype=torch.int32, device=pool.device
        )
        if rule.may_select:
            state = TokenState.of(pool, self._cached_positions, rule.weighs)
            self._selector = Selector(
                self.tables, self.kernels, self.staging, self.clock, pool, state
            )

    def let_thin(self, rotations: Sequence[Rotation | None]) -> None:
        """Prepare for groups that leave a window.

        Args:
            rotations: of the keys of each layer with a cache of its own.
        """
        rule = cast(HeadPagedSpec, self.kv_cache_spec).rule
        assert isinstance(rule.policy, ThinningPolicy)
        on_device = self.kernels, self.staging, self.clock
        self._thinner = Thinner(rule.policy, rule.model, rotations, *on_device)
        self._thinner.try_policy(rule.policy.group, self.device)

    def settle(self) -> None:
        """Move what survives of prompts that were read in this step."""
        if self._selector is not None:
            self._selector.settle()

    def _requests(self, common: CommonAttentionMetadata) -> list[str]:
        if self._input_batch is None:  # vLLM profiles CUDA graphs
            return []
        requests: list[str] = self._input_batch.req_ids[: common.num_reqs]
        return requests

    def _page_lists(self) -> PageArray:
        """Page list of each batch row, ``[rows, pages]``."""
        lists: PageArray = self._input_batch.block_table[0].get_numpy_array()
        return lists

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadPagedMetadata:
        requests = self._requests(common_attn_metadata)
        return self._build(requests, common_attn_metadata)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> HeadPagedMetadata:
        # vLLM also replays graphs without a request, beside other ranks that have some.
        return self._build([], common_attn_metadata)

    def _build(
        self, requests: list[str], common: CommonAttentionMetadata
    ) -> HeadPagedMetadata:
        """Build a step's rows; tokens that no request has are padding."""
        if not requests:
            staged = self.staging.stage(None, common.num_actual_tokens)
            return self._metadata(common, staged, None)
        lengths, lists = lengths_of(common, len(requests)), self._page_lists()
        starts, seq_lens = lengths
        self.tables.refresh(requests, lists, seq_lens, seq_lens - np.diff(starts))
        step = self._rows.build(*lengths)
        staged = self.staging.stage(step, common.num_actual_tokens)
        selecting = None
        if self._selector is not None:
            selecting = self._selector.begin(requests, lists, *lengths, staged)
        meta = self._metadata(common, staged, selecting, self._positions(*lengths))
        if self._thinner is not None:
            meta.thinning = self._thinner.begin(self.tables.leaving)
        return meta

    def _positions(self, query_start: IntArray, seq_lens: IntArray) -> Positions | None:
        """Where tokens stand, if a layer asks."""
        cached = self._cached_positions
        if cached is None or not self._asks_distance:
            return None
        own = positions_of(query_start, seq_lens).astype(np.int32)
        return Positions(cached, self.staging.tensor(own))

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        staged: StagedRows,
        selecting: SelectingStep | None,
        positions: Positions | None = None,
    ) -> HeadPagedMetadata:
        return HeadPagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=staged.num_decode_tokens,
            rows=staged.rows,
            page_tables=staged.page_tables,
            slots=staged.slots,
            copies=staged.copies,
            clock=self.clock,
            selecting=selecting,
            positions=positions,
        )


def _impls(vllm_config: VllmConfig) -> list[HeadPagedAttention]:
    """What computes the attention of each layer."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return [cast(HeadPagedAttention, layer.impl) for layer in layers.values()]


def lengths_of(
    common: CommonAttentionMetadata, requests: int
) -> tuple[IntArray, IntArray]:
    """First token of each request, ``[requests + 1]``, and its tokens when it is done.

    vLLM calls the host's lengths an upper bound; they are exact where steps are
    planned one at a time, guessed tokens included.
    """
    seq_lens = common.seq_lens_cpu_upper_bound
    assert seq_lens is not None, "the model runner fills it in"
    query_start = common.query_start_loc_cpu[: requests + 1]
    lengths = seq_lens[:requests]
    return query_start.numpy().astype(np.int64), lengths.numpy().astype(np.int64)
