# SPDX-License-Identifier: Apache-2.0
"""What policies that select after a dense prefill do on the worker, and nothing else.

A :class:`Selector` lives as long as the engine, a :class:`SelectingStep` for a step in
which some request selects; attention calls it as each layer goes by. What must be
remembered of a cached token lies in tensors parallel to the pool, indexed by page and
place, so it moves, is preempted and is forgotten with its page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.clock import Clock
from kvserve.engine.devices.device import Device
from kvserve.engine.devices.staging import StagedRows, Staging
from kvserve.engine.worker.survivors import (
    LastPages,
    Reader,
    Survivors,
    keep_last,
    select,
)
from kvserve.kernels.score_form import Positions, ScoreForm, window_weights
from kvserve.kernels.statistics import CachedRows
from kvserve.plan.blocks import blocks_of
from kvserve.plan.dense import DensePlan
from kvserve.plan.lanes import BoolArray, IntArray, PageArray
from policies.base import Prompt


@dataclass
class TokenState:
    """Per cached token, ``[num_pages, page_size]`` each.

    Attributes:
        position: its position in the request, int32.
        mass: attention that it has received, float32; ``None`` if no policy may ask.
    """

    position: torch.Tensor
    mass: torch.Tensor | None

    @classmethod
    def of(cls, pool: torch.Tensor, position: torch.Tensor, weighs: bool) -> TokenState:
        """Make room for the tokens of a pool.

        Args:
            weighs: whether a policy may ask for attention mass.
        """
        mass = torch.zeros(position.shape, device=pool.device) if weighs else None
        return cls(position, mass)


@dataclass(frozen=True)
class DecodeRows:
    """What selecting needs to know of a step's decode rows.

    Attributes:
        positions: position of each token for each head, ``[tokens * H_kv]``, int32.
        lengths: tokens of each row's lane, ``[num_layers, rows]``.
        widest: pages of the longest of them.
        heavy: rows whose slot is chosen by score, by whether mass counts per query, of
            each layer ``[n]``.
        safe_from: position from which tokens are safe from it, ``[num_layers, rows]``.
        weighed: rows of requests that have read their prompts and weigh, ``[n]``.
    """

    positions: torch.Tensor
    lengths: torch.Tensor
    widest: int
    heavy: dict[bool, list[torch.Tensor]]
    safe_from: torch.Tensor
    weighed: torch.Tensor


class Selector:
    """Gathers what policies ask for, lets them select, and moves what survives.

    Args:
        pool: the cache, ``[num_pages, 1, page_size, bytes or numbers]``.
        state: what is remembered of the pool's tokens.
    """

    def __init__(
        self,
        tables: PageTables,
        kernels: Device,
        staging: Staging,
        clock: Clock,
        pool: torch.Tensor,
        state: TokenState,
    ) -> None:
        self.tables, self.kernels, self.staging = tables, kernels, staging
        self.clock, self._pool = clock, pool
        self.state = state
        if state.mass is not None:
            kernels.prepare_statistics(pool)
        self._step: SelectingStep | None = None

    def begin(
        self,
        requests: list[str],
        page_lists: PageArray,
        query_start: IntArray,
        seq_lens: IntArray,
        staged: StagedRows,
    ) -> SelectingStep | None:
        """Look at a step's batch; ``None`` if nobody selects.

        Args:
            page_lists: of each batch row.
            query_start: first token of each request, ``[requests + 1]``.
            seq_lens: tokens of each request when the step is done.
        """
        self._step = None
        plans = {
            row: plan
            for row, name in enumerate(requests)
            if isinstance(plan := self.tables.plan_of(name), DensePlan)
            and not plan.is_whole
        }
        if not plans:
            return None
        readers = [
            self._reader(row, requests[row], plan, page_lists, query_start, seq_lens)
            for row, plan in plans.items()
            if plan.is_reading(int(seq_lens[row]))
        ]
        reading = {reader.request_id for reader in readers}
        decodes = {
            row: plan
            for row, plan in plans.items()
            if row < staged.num_decode_tokens and requests[row] not in reading
        }
        rows = self._decode_rows(decodes, query_start, seq_lens, staged)
        self._step = SelectingStep(self, staged, rows, readers)
        return self._step

    def _reader(
        self,
        row: int,
        name: str,
        plan: DensePlan,
        page_lists: PageArray,
        query_start: IntArray,
        seq_lens: IntArray,
    ) -> Reader:
        length = int(seq_lens[row])
        blocks = blocks_of(length, plan.page_size)
        pages = self.tables.by_slot[:, row, :, :blocks].astype(np.int64)
        tokens = slice(int(query_start[row]), int(query_start[row + 1]))
        local = self._last_pages(row, plan) if length == plan.prompt_tokens else {}
        kept = page_lists[row, : plan.kept_entries].copy()
        bring = self.staging.tensor
        return Reader(name, plan, tokens, length, bring(pages), local, kept)

    def _last_pages(self, row: int, plan: DensePlan) -> dict[int, LastPages]:
        """Where local layers have what they keep of a prompt that is read."""
        found, lanes = {}, plan.full.lanes
        for layer in self.tables.local_layers:
            keep = int(plan.keep[layer, 0])
            first = plan.prompt_tokens - keep
            blocks = np.arange(
                first // plan.page_size, blocks_of(plan.prompt_tokens, plan.page_size)
            )
            shape = *plan.keep.shape, len(blocks)
            slots = np.broadcast_to(lanes.slot_of(blocks), shape)[layer]
            by_slot = self.tables.by_slot[layer, row].astype(np.int64)
            pages = self.staging.tensor(np.take_along_axis(by_slot, slots, axis=1))
            found[layer] = LastPages(pages, first % plan.page_size, keep)
        return found

    def _decode_rows(
        self,
        decodes: dict[int, DensePlan],
        query_start: IntArray,
        seq_lens: IntArray,
        staged: StagedRows,
    ) -> DecodeRows:
        settled, bring = self.tables.settled, self.staging.tensor
        count, heads = staged.num_decode_tokens, settled.dropped.shape[2]
        rows = slice(count)
        held = self.tables.tokens_seen(seq_lens[rows])
        full = settled.is_full(seq_lens[rows]) & settled.heavy[:, rows]
        safe_from = seq_lens[rows, None] - 1 - settled.protected[:, rows]
        weighs = np.zeros((count, heads), dtype=bool)
        per_query = np.zeros(count, dtype=bool)
        for row, plan in decodes.items():
            weighs[row] = plan.rule.weighs
            per_query[row] = plan.rule.policy.mass_per_query
        return DecodeRows(
            bring(positions_of(query_start, seq_lens).astype(np.int32).repeat(heads)),
            bring(_by_row(held)),
            blocks_of(int(held.max(initial=1)), self._pool.shape[2]),
            {
                counts: self._rows_of(full & (per_query == counts)[:, None])
                for counts in {bool(one) for one in per_query}
            },
            bring(_by_row(safe_from)),
            bring(np.flatnonzero(weighs)),
        )

    def _rows_of(self, chosen: BoolArray) -> list[torch.Tensor]:
        """Kernel rows of each layer that are ``chosen [num_layers, rows, heads]``."""
        return self.staging.tensors([np.flatnonzero(layer) for layer in chosen])

    def settle(self) -> None:
        """Move survivors to the front of their requests' page lists."""
        step, self._step = self._step, None
        for reader, layers in step.survivors if step else ():
            with self.clock.compacting():
                self._settle(reader, layers)

    def _settle(self, reader: Reader, layers: list[Survivors]) -> None:
        plan, size = reader.plan, self._pool.shape[2]
        place = plan.kept_places
        page = reader.kept[place // size].astype(np.int64)
        slots = self.staging.tensor(page * size + place % size)
        keys = torch.cat([layer.keys for layer in layers])
        values = torch.cat([layer.values for layer in layers])
        self.kernels.write(keys, values, self._pool, slots)
        state = self.state
        positions = torch.cat([layer.positions for layer in layers])
        state.position.view(-1)[slots] = positions.int()
        masses = [layer.mass for layer in layers if layer.mass is not None]
        if state.mass is not None and masses:
            state.mass.view(-1)[slots] = torch.cat(masses)
        heads = np.array([layer.selection.head_of_lane for layer in layers])
        self.tables.settle(reader.request_id, plan, heads.argsort(axis=1))


@dataclass
class SelectingStep:
    """One step in which some request selects, as its layers go by."""

    selector: Selector
    staged: StagedRows
    rows: DecodeRows
    readers: list[Reader]
    _survivors: dict[str, list[Survivors]] = field(default_factory=dict)

    @property
    def survivors(self) -> list[tuple[Reader, list[Survivors]]]:
        """What layers keep of each request that has read its prompt."""
        done = self._survivors
        return [(r, done[r.request_id]) for r in self.readers if r.request_id in done]

    def make_room(self, layer: int, slots: torch.Tensor) -> None:
        """Give full heavy lanes' new tokens the slots of those that they evict."""
        state = self.selector.state
        for counts, heavy in self.rows.heavy.items():
            rows = heavy[layer]
            if state.mass is not None and len(rows):
                with self.selector.clock.selecting():
                    slots[rows] = self.selector.kernels.lightest_slots(
                        self._cached(layer, rows),
                        state.mass,
                        state.position,
                        self.rows.positions,
                        self.rows.safe_from[layer],
                        counts,
                    )

    def written(self, slots: torch.Tensor) -> None:
        """Note the tokens that a layer has written."""
        state = self.selector.state
        state.position.view(-1).index_copy_(0, slots, self.rows.positions)
        if state.mass is not None:
            state.mass.view(-1).index_fill_(0, slots, 0)

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        form: ScoreForm,
        positions: Positions | None,
    ) -> None:
        """Look at a layer once it has attended.

        Args:
            query: ``[tokens, H_q, D]``.
            form: how the layer scores keys.
            positions: of the step's tokens and the pool's, where the form asks.
        """
        mass = self.selector.state.mass
        with self.selector.clock.selecting():
            is_local = layer in self.selector.tables.local_layers
            if mass is not None and len(self.rows.weighed) and not is_local:
                decodes = query[: self.staged.num_decode_tokens]
                heads = self.selector.tables.open_page.shape[2]
                group, size = query.shape[1] // heads, query.shape[2]
                self.selector.kernels.add_row_attention(
                    decodes.reshape(-1, group, size),
                    kv_cache,
                    self._cached(layer, self.rows.weighed),
                    scale,
                    mass,
                    form,
                    positions,
                )
            for reader in self.readers:
                self._read_on(layer, query, kv_cache, reader, scale, form)

    def _cached(self, layer: int, rows: torch.Tensor) -> CachedRows:
        page_size = self.selector.state.position.shape[1]
        table, lengths = self.staged.page_tables[layer], self.rows.lengths[layer]
        return CachedRows(table, lengths, rows, page_size, self.rows.widest)

    def _read_on(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        reader: Reader,
        scale: float,
        form: ScoreForm,
    ) -> None:
        """Gather a chunk's statistics; after the last one, select what survives."""
        if layer in self.selector.tables.local_layers:
            if reader.is_done:
                kept = keep_last(self.selector.kernels, kv_cache, reader, layer)
                self._survivors.setdefault(reader.request_id, []).append(kept)
            return
        mass = self.selector.state.mass if reader.plan.rule.weighs else None
        if mass is None and not reader.is_done:
            return
        kernels, length, total = self.selector.kernels, reader.length, None
        pages = reader.pages[layer]
        keys = kernels.read_keys(kv_cache, pages).flatten(1, 2)[:, :length]
        chunk = query[reader.tokens].transpose(0, 1)
        if mass is not None:
            drawn = mass[pages].flatten(1)
            total = drawn[:, :length]
            total += kernels.attention_mass(chunk, keys, scale, form)
            mass[pages] = drawn.view(*pages.shape, -1)
        if reader.is_done:
            values = kernels.read_values(kv_cache, pages)
            values = values.flatten(1, 2)[:, :length]
            window = min(reader.plan.rule.observed, length)
            prompt = Prompt(
                keys.float(),
                values.float(),
                chunk[:, chunk.shape[1] - window :].float(),
                scale,
                total,
                partial(window_weights, form=form) if form else None,
            )
            kept = select(reader, layer, prompt, keys, values)
            self._survivors.setdefault(reader.request_id, []).append(kept)


def _by_row(by_lane: IntArray) -> IntArray:
    """Flatten ``[num_layers, rows, num_kv_heads]`` to kernel rows of each layer."""
    flat: IntArray = by_lane.reshape(len(by_lane), -1)
    return flat


def positions_of(query_start: IntArray, seq_lens: IntArray) -> IntArray:
    """Position of each token of a step in its request."""
    lengths = np.diff(query_start)
    last = np.repeat(seq_lens - query_start[1:], lengths)
    positions: IntArray = last + np.arange(query_start[-1])
    return positions
