# SPDX-License-Identifier: Apache-2.0
"""The attention backend of policies that select after a dense prefill."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from kvserve.engine.batch.dense_tables import DenseRowBuilder, DenseTables
from kvserve.engine.batch.page_tables import PageArray, PageTables
from kvserve.engine.batch.rows import RowBuilder
from kvserve.engine.devices import hardware
from kvserve.engine.spec import DensePagedSpec
from kvserve.engine.worker.attention import HeadPagedMetadata
from kvserve.engine.worker.backend import (
    HeadPagedBackend,
    HeadPagedMetadataBuilder,
    lengths_of,
)
from kvserve.engine.worker.dense_attention import (
    DenseMetadata,
    DensePagedAttention,
    Reader,
    Survivors,
    TokenState,
)
from kvserve.plan.lanes import IntArray
from kvserve.plan.page_plan import blocks_of


class DensePagedBackend(HeadPagedBackend):
    """Stands in for another backend like its base."""

    @staticmethod
    def get_impl_cls() -> type[DensePagedAttention]:
        return DensePagedAttention

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return DenseMetadataBuilder


class DenseMetadataBuilder(HeadPagedMetadataBuilder):
    """Builds a step's rows, and moves survivors when all its layers are done."""

    # A step of single tokens may end a prompt, which a graph would not notice.
    _cudagraph_support = AttentionCGSupport.NEVER

    tables: DenseTables
    kv_cache_spec: DensePagedSpec

    def _make_tables(self, vllm_config: VllmConfig) -> tuple[PageTables, RowBuilder]:
        tables = hardware.dense_tables_class()(
            self.kv_cache_spec.rule,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )
        self._step: DenseMetadata | None = None
        self._lists_of: dict[str, PageArray] = {}
        return tables, DenseRowBuilder(tables)

    def make_state(self, pool: torch.Tensor) -> TokenState:
        """Make room for what is remembered of each cached token."""
        shape = pool.shape[0], pool.shape[2]
        self._pool, mass = pool, None
        asked = self.kv_cache_spec.rule.policy.capabilities.statistics
        if "attention mass" in asked:
            self.kernels.prepare_statistics(pool)
            mass = torch.zeros(shape, device=pool.device)
        position = torch.full(shape, -1, dtype=torch.int32, device=pool.device)
        self._state = TokenState(position, mass)
        return self._state

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadPagedMetadata:
        common = common_attn_metadata
        base = super().build(common_prefix_len, common, fast_build)
        query_start, seq_lens = lengths_of(common, common.num_reqs)
        rows = slice(base.num_decode_tokens)
        tables = self.tables
        held = tables.lane_tokens(seq_lens[rows])
        full = seq_lens[rows, None] - tables.dropped[:, rows] > held
        readers = self._readers(common, query_start, seq_lens)
        heads, page_size = self.kv_cache_spec.plan.num_kv_heads, self._pool.shape[2]
        bring = self.staging.tensor
        positions = _positions(query_start, seq_lens)
        heavy = full & tables.heavy[:, rows]
        safe_from = seq_lens[rows, None] - 1 - tables.protected[:, rows]
        self._step = DenseMetadata(
            **{one.name: getattr(base, one.name) for one in fields(base)},
            positions=bring(positions.astype(np.int32).repeat(heads)),
            lengths=bring(_by_row(held)),
            widest=blocks_of(int(held.max(initial=1)), page_size),
            heavy=self.staging.tensors([np.flatnonzero(layer) for layer in heavy]),
            safe_from=bring(_by_row(safe_from)),
            weighed=bring(self._weighed(base.num_decode_tokens, readers)),
            readers=readers,
        )
        return self._step

    def _weighed(self, num_decodes: int, readers: list[Reader]) -> IntArray:
        """Decode rows whose tokens do not read a prompt."""
        heads = self.kv_cache_spec.plan.num_kv_heads
        decodes = np.ones((num_decodes, heads), dtype=bool)
        decodes[[r.tokens.start for r in readers if r.tokens.start < num_decodes]] = 0
        return np.flatnonzero(decodes)

    def _readers(
        self,
        common: CommonAttentionMetadata,
        query_start: IntArray,
        seq_lens: IntArray,
    ) -> list[Reader]:
        readers = []
        lists = self._page_lists()
        for row, name in enumerate(self._requests(common)):
            plan = self.tables.plan_of(name)
            length = int(seq_lens[row])
            if length > plan.prompt_tokens:
                continue
            blocks = blocks_of(length, plan.page_size)
            pages = self.tables.by_slot[:, row, :, :blocks].astype(np.int64)
            tokens = slice(int(query_start[row]), int(query_start[row + 1]))
            reader = Reader(name, plan, tokens, length, self.staging.tensor(pages))
            if reader.is_done:
                self._lists_of[name] = lists[row, : plan.kept_entries].copy()
            readers.append(reader)
        return readers

    def settle(self) -> None:
        """Move survivors to the front of their requests' page lists."""
        step, self._step = self._step, None
        for request_id, layers in (step.survivors if step else {}).items():
            with self.clock.compacting():
                self._settle(request_id, layers, self._lists_of.pop(request_id))

    def _settle(
        self, request_id: str, layers: list[Survivors], pages: PageArray
    ) -> None:
        plan, size = self.tables.plan_of(request_id), self._pool.shape[2]
        place = plan.kept_places
        page = pages[place // size].astype(np.int64)
        slots = self.staging.tensor(page * size + place % size)
        keys = torch.cat([layer.keys for layer in layers])
        values = torch.cat([layer.values for layer in layers])
        self.kernels.write(keys, values, self._pool, slots)
        state = self._state
        positions = torch.cat([layer.positions for layer in layers])
        state.position.view(-1)[slots] = positions.int()
        if state.mass is not None:
            masses = [layer.mass for layer in layers if layer.mass is not None]
            state.mass.view(-1)[slots] = torch.cat(masses)
        heads = np.array([layer.selection.head_of_lane for layer in layers])
        self.tables.settle(request_id, heads.argsort(axis=1))


def _by_row(by_lane: IntArray) -> IntArray:
    """Flatten ``[num_layers, rows, num_kv_heads]`` to kernel rows of each layer."""
    flat: IntArray = by_lane.reshape(len(by_lane), -1)
    return flat


def _positions(query_start: IntArray, seq_lens: IntArray) -> IntArray:
    lengths = np.diff(query_start)
    last = np.repeat(seq_lens - query_start[1:], lengths)
    positions: IntArray = last + np.arange(query_start[-1])
    return positions
