# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer under a policy that scores tokens.

What a policy must remember of a cached token lies in tensors parallel to the pool,
indexed by page and place, so it moves, is preempted and is forgotten with its page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch

from kvserve.engine.worker.attention import HeadPagedAttention, HeadPagedMetadata
from kvserve.kernels.statistics import CachedRows
from kvserve.plan.dense import DensePlan
from policies.base import DensePolicy, ModelShape, Prompt, Selection


@dataclass
class TokenState:
    """Per cached token, ``[num_pages, page_size]`` each.

    Attributes:
        position: Its position in the request, int32.
        mass: Attention it has received, float32; ``None`` if no policy asks.
    """

    position: torch.Tensor
    mass: torch.Tensor | None


@dataclass(frozen=True)
class Reader:
    """A request that reads its prompt in this step.

    Attributes:
        plan: Its page plan.
        tokens: Tokens ``[first, last)`` of the step that are its chunk.
        length: Tokens of its prompt that are cached when the step is done.
        pages: Its pages, ``[num_layers, num_kv_heads, blocks]``.
    """

    request_id: str
    plan: DensePlan
    tokens: slice
    length: int
    pages: torch.Tensor

    @property
    def is_done(self) -> bool:
        return self.length == self.plan.prompt_tokens and not self.plan.is_whole


@dataclass(frozen=True)
class Survivors:
    """What one layer of a request keeps, to be written when all layers are done.

    ``keys``, ``values`` ``[n, d]``, of the pool's type, ``positions`` and ``mass``
    ``[n]`` are lane after lane.
    """

    selection: Selection
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mass: torch.Tensor | None


@dataclass
class DenseMetadata(HeadPagedMetadata):
    """One step's rows, and who reads a prompt.

    Attributes:
        positions: Position of each row's token, ``[tokens * H_kv]``, int32.
        lengths: Tokens of each decode row's lane, ``[num_layers, rows]``.
        widest: Pages of the longest of them.
        heavy: Decode rows whose slot is chosen by score, of each layer ``[n]``.
        safe_from: Position from which tokens are safe from it, ``[num_layers, rows]``.
        weighed: Decode rows of requests that have read theirs, ``[n]``.
        readers: Requests that read a prompt.
        survivors: What their layers keep, by request, filled as layers are done.
    """

    positions: torch.Tensor
    lengths: torch.Tensor
    widest: int
    heavy: list[torch.Tensor]
    safe_from: torch.Tensor
    weighed: torch.Tensor
    readers: list[Reader]
    survivors: dict[str, list[Survivors]] = field(default_factory=dict)


class DensePagedAttention(HeadPagedAttention):
    """Full attention while a prompt is read; then each lane sees what it kept."""

    def learn(self, policy: DensePolicy, model: ModelShape, state: TokenState) -> None:
        """Tell the layer its policy and where token state lies."""
        self._policy, self._model, self._state = policy, model, state
        self._count = policy.mass_per_query

    def _write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: HeadPagedMetadata,
    ) -> None:
        dense = cast(DenseMetadata, meta)
        slots = dense.slots[self._layer_index]
        mass = self._state.mass
        if mass is not None:
            self._evict_for(dense, mass, slots)
        self._device.write(key, value, kv_cache, slots)
        self._state.position.view(-1).index_copy_(0, slots, dense.positions)
        if mass is not None:
            mass.view(-1).index_fill_(0, slots, 0)

    def _evict_for(
        self, meta: DenseMetadata, mass: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Give full heavy lanes' new tokens the slots of those they evict."""
        layer, rows = self._layer_index, meta.heavy[self._layer_index]
        if len(rows):
            with meta.clock.selecting():
                slots[rows] = self._device.lightest_slots(
                    self._cached(meta, rows, mass),
                    mass,
                    self._state.position,
                    meta.positions,
                    meta.safe_from[layer],
                    self._count,
                )

    def _cached(
        self, meta: DenseMetadata, rows: torch.Tensor, mass: torch.Tensor
    ) -> CachedRows:
        layer, page_size = self._layer_index, mass.shape[1]
        table, lengths = meta.page_tables[layer], meta.lengths[layer]
        return CachedRows(table, lengths, rows, page_size, meta.widest)

    def _observe(
        self, query: torch.Tensor, kv_cache: torch.Tensor, meta: HeadPagedMetadata
    ) -> None:
        dense, mass = cast(DenseMetadata, meta), self._state.mass
        with dense.clock.selecting():
            if mass is not None and len(dense.weighed):
                decodes = query[: dense.num_decode_tokens]
                self._device.add_row_attention(
                    decodes.reshape(-1, self._group_size, self.head_size),
                    kv_cache,
                    self._cached(dense, dense.weighed, mass),
                    self.scale,
                    mass,
                )
            for reader in dense.readers:
                self._read_on(query, kv_cache, reader, dense)

    def _read_on(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        reader: Reader,
        meta: DenseMetadata,
    ) -> None:
        """Gather a chunk's statistics; after the last one, select what survives."""
        mass = self._state.mass
        if mass is None and not reader.is_done:
            return
        length, total = reader.length, None
        pages = reader.pages[self._layer_index]
        keys = self._device.read_keys(kv_cache, pages).flatten(1, 2)[:, :length]
        chunk = query[reader.tokens].transpose(0, 1)
        if mass is not None:
            drawn = mass[pages].flatten(1)
            total = drawn[:, :length]
            total += self._device.attention_mass(chunk, keys, self.scale)
            mass[pages] = drawn.view(*pages.shape, -1)
        if reader.is_done:
            values = self._device.read_values(kv_cache, pages)
            values = values.flatten(1, 2)[:, :length]
            kept = self._survivors(reader, chunk, keys, values, total)
            meta.survivors.setdefault(reader.request_id, []).append(kept)

    def _survivors(
        self,
        reader: Reader,
        chunk: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mass: torch.Tensor | None,
    ) -> Survivors:
        window = min(self._policy.observation_window, reader.length)
        queries = chunk[:, chunk.shape[1] - window :].float()
        prompt = Prompt(keys.float(), values.float(), queries, self.scale, mass)
        lanes = reader.plan.lanes[self._layer_index]
        chosen = self._policy.select(self._model, self._layer_index, prompt, lanes)
        lane_heads = list(zip(chosen.head_of_lane, chosen.positions, strict=True))
        if [len(kept) for _, kept in lane_heads] != [lane.keep for lane in lanes]:
            raise RuntimeError(f"policy {self._policy.name} broke its own lanes")

        def gather(source: torch.Tensor) -> torch.Tensor:
            rows = [source[head].index_select(0, kept) for head, kept in lane_heads]
            return torch.cat(rows)

        return Survivors(
            chosen,
            gather(keys),
            gather(values),
            torch.cat(chosen.positions),
            None if mass is None else gather(mass),
        )
