# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer under a policy that scores tokens.

What a policy must remember of a cached token lies in tensors parallel to the pool,
indexed by page and place, so it moves, is preempted and is forgotten with its page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch

from kvserve.dense_plan import DensePlan
from kvserve.engine.attention import HeadPagedAttention, HeadPagedMetadata
from kvserve.kernels.statistics import attention_mass, lightest, row_attention
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

    ``keys``, ``values`` ``[n, d]``, ``positions`` and ``mass`` ``[n]`` are lane after
    lane.
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
        positions: Position of each token, ``[tokens]``.
        lengths: Tokens of each decode row's lane, ``[num_layers, rows]``.
        heavy: Decode rows whose slot is chosen by score, ``[num_layers, rows]``.
        protected: Last tokens that are safe from it, ``[num_layers, rows]``.
        weighed: Decode rows of requests that have read theirs, ``[n]``.
        readers: Requests that read a prompt.
        survivors: What their layers keep, by request, filled as layers are done.
    """

    positions: torch.Tensor
    lengths: torch.Tensor
    heavy: torch.Tensor
    protected: torch.Tensor
    weighed: torch.Tensor
    readers: list[Reader]
    survivors: dict[str, list[Survivors]] = field(default_factory=dict)


class DensePagedAttention(HeadPagedAttention):
    """Full attention while a prompt is read; then each lane sees what it kept."""

    def learn(self, policy: DensePolicy, model: ModelShape, state: TokenState) -> None:
        """Tell the layer its policy and where token state lies."""
        self._policy, self._model, self._state = policy, model, state
        self._count = bool(getattr(policy, "mass_per_query", False))

    def _write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: HeadPagedMetadata,
    ) -> None:
        dense = cast(DenseMetadata, meta)
        slots = dense.slots[self._layer_index]
        self._evict_for(dense, slots)
        self._device.write(key, value, kv_cache, slots)
        positions = dense.positions.repeat_interleave(self._num_kv_heads)
        self._state.position.view(-1)[slots] = positions.int()
        if self._state.mass is not None:
            self._state.mass.view(-1)[slots] = 0

    def _evict_for(self, meta: DenseMetadata, slots: torch.Tensor) -> None:
        """Give full heavy lanes' new tokens the slots of those they evict."""
        layer, mass = self._layer_index, self._state.mass
        rows = meta.heavy[layer].nonzero().flatten()
        if mass is None or not len(rows):
            return
        size = mass.shape[1]
        pages, inside = self._lane_pages(meta, rows, size)
        position = self._state.position[pages].flatten(1)
        position = position.masked_fill(~inside, -1)
        weight = mass[pages].flatten(1)
        own = meta.positions[rows // self._num_kv_heads]
        if self._count:
            weight = weight / (own[:, None] - position)
        victim = lightest(weight, position, own - meta.protected[layer, rows])
        page = pages.gather(1, (victim // size)[:, None])[:, 0]
        slots[rows] = page * size + victim % size

    def _lane_pages(
        self, meta: DenseMetadata, rows: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of decode rows, and which of their slots hold tokens."""
        lengths = meta.lengths[self._layer_index, rows]
        width = int(-(-lengths.max() // size))
        pages = meta.page_tables[self._layer_index][rows, :width].long()
        inside = torch.arange(width * size)[None] < lengths[:, None]
        return pages, inside

    def _observe(
        self, query: torch.Tensor, kv_cache: torch.Tensor, meta: HeadPagedMetadata
    ) -> None:
        dense = cast(DenseMetadata, meta)
        if self._state.mass is not None:
            self._weigh_decodes(query, kv_cache, dense)
        for reader in dense.readers:
            self._read_on(query, kv_cache, reader, dense)

    def _weigh_decodes(
        self, query: torch.Tensor, kv_cache: torch.Tensor, meta: DenseMetadata
    ) -> None:
        """Add what decoding tokens look at to the mass of what they look at."""
        mass, rows = self._state.mass, meta.weighed
        if mass is None or not len(rows):
            return
        size = mass.shape[1]
        pages, inside = self._lane_pages(meta, rows, size)
        keys = self._device.read_keys(kv_cache, pages)
        by_row = query[: meta.num_decode_tokens].reshape(
            -1, self._group_size, self.head_size
        )[rows]
        lengths = meta.lengths[self._layer_index, rows]
        drawn = row_attention(by_row, keys.flatten(1, 2), lengths, self.scale)
        slots = pages[..., None] * size + torch.arange(size)
        mass.view(-1).index_add_(0, slots.flatten(1)[inside], drawn[inside])

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
        length = reader.length
        pages = reader.pages[self._layer_index]
        keys = self._device.read_keys(kv_cache, pages)
        keys = keys.flatten(1, 2)[:, :length].float()
        chunk = query[reader.tokens].transpose(0, 1)
        if mass is not None:
            drawn = mass[pages].flatten(1)
            drawn[:, :length] += attention_mass(chunk, keys, self.scale)
            mass[pages] = drawn.view_as(mass[pages])
        if reader.is_done:
            values = self._device.read_values(kv_cache, pages)
            values = values.flatten(1, 2)[:, :length].float()
            total = mass[pages].flatten(1)[:, :length] if mass is not None else None
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
        prompt = Prompt(keys, values, queries, self.scale, mass)
        lanes = reader.plan.lanes[self._layer_index]
        chosen = self._policy.select(self._model, self._layer_index, prompt, lanes)
        lane_heads = list(zip(chosen.head_of_lane, chosen.positions, strict=True))
        if [len(kept) for _, kept in lane_heads] != [lane.keep for lane in lanes]:
            raise RuntimeError(f"policy {self._policy.name} broke its own lanes")

        def gather(source: torch.Tensor) -> torch.Tensor:
            return torch.cat([source[head, kept] for head, kept in lane_heads])

        return Survivors(
            chosen,
            gather(keys),
            gather(values),
            torch.cat(chosen.positions),
            None if mass is None else gather(mass),
        )
