# SPDX-License-Identifier: Apache-2.0
"""What policies that select after a dense prefill do on the worker, and nothing else.

A :class:`Selector` lives as long as the engine, a :class:`SelectingStep` for a step in
which some request selects; attention calls it as each layer goes by. What must be
remembered of a cached token lies in tensors parallel to the pool, indexed by page and
place, so it moves, is preempted and is forgotten with its page.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from kvserve.engine.batch.page_tables import PageArray, PageTables
from kvserve.engine.clock import Clock
from kvserve.engine.devices.cpu import Device
from kvserve.engine.devices.staging import StagedRows, Staging
from kvserve.kernels.statistics import CachedRows
from kvserve.plan.dense import DensePlan
from kvserve.plan.lanes import BoolArray, IntArray
from kvserve.plan.page_plan import blocks_of
from policies.base import Prompt, Selection


@dataclass
class TokenState:
    """Per cached token, ``[num_pages, page_size]`` each.

    Attributes:
        position: its position in the request, int32.
        mass: attention that it has received, float32; ``None`` if no policy may ask.
    """

    position: torch.Tensor
    mass: torch.Tensor | None


@dataclass(frozen=True)
class Reader:
    """A request that reads its prompt in this step.

    Attributes:
        plan: its page plan.
        tokens: tokens ``[first, last)`` of the step that are its chunk.
        length: tokens of its prompt that are cached when the step is done.
        pages: its pages, ``[num_layers, num_kv_heads, blocks]``.
        kept: the front of its page list, to which survivors move.
    """

    request_id: str
    plan: DensePlan
    tokens: slice
    length: int
    pages: torch.Tensor
    kept: PageArray

    @property
    def is_done(self) -> bool:
        return self.length == self.plan.prompt_tokens


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
        weighs: whether a policy may ask for attention mass.
    """

    def __init__(
        self,
        tables: PageTables,
        kernels: Device,
        staging: Staging,
        clock: Clock,
        pool: torch.Tensor,
        weighs: bool,
    ) -> None:
        self.tables, self.kernels, self.staging = tables, kernels, staging
        self.clock, self._pool = clock, pool
        shape, mass = (pool.shape[0], pool.shape[2]), None
        if weighs:
            kernels.prepare_statistics(pool)
            mass = torch.zeros(shape, device=pool.device)
        position = torch.full(shape, -1, dtype=torch.int32, device=pool.device)
        self.state = TokenState(position, mass)
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
        kept = page_lists[row, : plan.kept_entries].copy()
        return Reader(name, plan, tokens, length, self.staging.tensor(pages), kept)

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
            bring(_positions(query_start, seq_lens).astype(np.int32).repeat(heads)),
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
        self, layer: int, query: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        """Look at a layer once it has attended.

        Args:
            query: ``[tokens, H_q, D]``.
        """
        mass = self.selector.state.mass
        with self.selector.clock.selecting():
            if mass is not None and len(self.rows.weighed):
                decodes = query[: self.staged.num_decode_tokens]
                heads = self.selector.tables.open_page.shape[2]
                group, size = query.shape[1] // heads, query.shape[2]
                self.selector.kernels.add_row_attention(
                    decodes.reshape(-1, group, size),
                    kv_cache,
                    self._cached(layer, self.rows.weighed),
                    scale,
                    mass,
                )
            for reader in self.readers:
                self._read_on(layer, query, kv_cache, reader, scale)

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
    ) -> None:
        """Gather a chunk's statistics; after the last one, select what survives."""
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
            total += kernels.attention_mass(chunk, keys, scale)
            mass[pages] = drawn.view(*pages.shape, -1)
        if reader.is_done:
            values = kernels.read_values(kv_cache, pages)
            values = values.flatten(1, 2)[:, :length]
            kept = _select(reader, layer, chunk, keys, values, scale, total)
            self._survivors.setdefault(reader.request_id, []).append(kept)


def _select(
    reader: Reader,
    layer: int,
    chunk: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mass: torch.Tensor | None,
) -> Survivors:
    """Let the policy select from a prompt, and gather what it keeps."""
    rule, lanes = reader.plan.rule, reader.plan.lanes[layer]
    window = min(rule.observed, reader.length)
    queries = chunk[:, chunk.shape[1] - window :].float()
    prompt = Prompt(keys.float(), values.float(), queries, scale, mass)
    chosen = rule.policy.select(rule.model, layer, prompt, lanes)
    lane_heads = list(zip(chosen.head_of_lane, chosen.positions, strict=True))
    if [len(kept) for _, kept in lane_heads] != [lane.keep for lane in lanes]:
        raise RuntimeError(f"policy {rule.policy.name} broke its own lanes")

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


def _by_row(by_lane: IntArray) -> IntArray:
    """Flatten ``[num_layers, rows, num_kv_heads]`` to kernel rows of each layer."""
    flat: IntArray = by_lane.reshape(len(by_lane), -1)
    return flat


def _positions(query_start: IntArray, seq_lens: IntArray) -> IntArray:
    lengths = np.diff(query_start)
    last = np.repeat(seq_lens - query_start[1:], lengths)
    positions: IntArray = last + np.arange(query_start[-1])
    return positions
