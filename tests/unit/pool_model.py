# SPDX-License-Identifier: Apache-2.0
"""Runs a step's rows over a pool of labels instead of keys, and checks every read.

Each (page, offset) holds the label of the token cached there, so a query that reads
another request's, head's or layer's key, or a stale one, is caught by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from random import Random
from typing import NamedTuple

from kvserve.engine.batch.leaving import Leaving
from kvserve.engine.batch.rows import RowShapes, StepRows
from kvserve.plan.layout import LayerHeads
from kvserve.plan.page_plan import PagePlan
from tests.reference.visibility import (
    groups_in_front,
    kept_of_group,
    tokens_of_group,
    visible_positions,
)
from tests.unit.simulator import Batch, Request


class Label(NamedTuple):
    """A cached key; ``life`` tells a resumed request from its preempted self.

    ``refused`` tells guesses at its position from the token that came.
    """

    request: str
    life: int
    layer: int
    head: int
    position: int
    refused: int = 0


class PoolModel:
    """The content of the pool, as a run of the engine's steps would leave it."""

    def __init__(self, plan: PagePlan, num_scratch: int) -> None:
        self._plan, self._num_scratch = plan, num_scratch
        # By page, which of the smaller pages in it, and offset.
        self._content: dict[tuple[int, int, int], Label] = {}
        one = LayerHeads(plan.num_kv_heads, 1, together=False)
        self._heads = plan.layout or (one,) * plan.num_layers

    def _label(self, request: Request, layer: int, head: int, position: int) -> Label:
        """What the request caches of a token."""
        refused = request.refused[position]
        return Label(request.name, request.life, layer, head, position, refused)

    def run(
        self, batch: Batch, step: StepRows, leaving: Iterable[Leaving] = ()
    ) -> None:
        """Write, thin, read and settle, layer by layer as the model's forward does."""
        for layer in range(self._plan.num_layers):
            self._write(layer, batch, step)
            for each in leaving:
                self._thin(layer, each)
            self._check_reads(layer, batch, step)
            if layer not in self._plan.reread:
                self._copy(layer, batch, step)
                self._check_retained(layer, batch)
        for layer in self._plan.reread:  # by the last layers
            self._check_reads(layer, batch, step)
            self._copy(layer, batch, step)
            self._check_retained(layer, batch)

    def _write(self, layer: int, batch: Batch, step: StepRows) -> None:
        owners, heads = batch.token_owners(), self._heads[layer].kv_heads
        slots = step.slots[layer].tolist()
        assert len(slots) == len(owners) * heads
        assert len(set(slots)) == len(slots), "two writes collide"
        for place, slot in enumerate(slots):
            (request, position), head = owners[place // heads], place % heads
            smaller, offset = divmod(slot, self._plan.page_size)
            page, within = divmod(smaller, self._heads[layer].per_page)
            assert page in request.pages or 1 <= page <= self._num_scratch
            assert offset == position % self._plan.page_size
            label = self._label(request, layer, head, position)
            self._content[page, within, offset] = label

    def _thin(self, layer: int, leaving: Leaving) -> None:
        """Move what a policy might keep, as targets and sources say."""
        size, heads = self._plan.page_size, self._plan.num_kv_heads
        length = self._plan.group * size
        most = int(leaving.keep[layer].max())
        held: list[Label | None] = []
        for page in leaving.packed[layer].tolist():
            held += [self._content.get((page, 0, place)) for place in range(size)]
        for head, group in itertools.product(range(heads), range(leaving.groups)):
            first = leaving.first + group * length
            keep = int(leaving.keep[layer, head])
            kept = kept_positions(layer, head, range(first, first + length), keep)
            pages = leaving.raw[layer, head].tolist()
            for position in kept:
                block, offset = divmod(position - leaving.first, size)
                label = self._content[pages[block], 0, offset]
                assert label.position == position
                held.append(label)
            held += [None] * (most - keep)
        targets = leaving.targets[layer].tolist()
        assert len(set(targets)) == len(targets)
        for source, target in zip(leaving.sources[layer], targets, strict=True):
            label = held[source]
            assert label is not None
            self._content[divmod(target, size)[0], 0, target % size] = label

    def _check_reads(self, layer: int, batch: Batch, step: StepRows) -> None:
        shape = self._shape(step, layer)
        owners, of_layer = batch.token_owners(), self._heads[layer]
        heads = of_layer.kv_heads
        starts = shape.query_start.tolist()
        assert starts[0] == 0
        assert starts[-1] == len(owners) * heads
        for row, seq_len in enumerate(shape.seq_lens.tolist()):
            keys = self._keys(layer, step.page_tables[layer][row].tolist(), seq_len)
            gap = range(*shape.gaps[row]) if shape.gaps is not None else range(0)
            counts = step.num_decode_tokens, len(owners), heads
            token, head = self._place(starts[row], *counts)
            assert shape.first[row] == token * heads + head
            for query in range(starts[row], starts[row + 1]):
                token, head = self._place(query, *counts)
                request, position = owners[token]
                # Causal, aligned to the end: a row's queries are its last tokens.
                behind = seq_len - (starts[row + 1] - 1 - query)
                seen = [key for j, key in enumerate(keys[:behind]) if j not in gap]
                expected = [
                    self._label(request, layer, head, visible)
                    for visible in self._visible(
                        request, layer, of_layer.lane_of_head[head], position
                    )
                ]
                assert sorted(seen) == expected

    def _visible(
        self, request: Request, layer: int, head: int, query: int
    ) -> list[int]:
        """Positions that a query sees, as they were or packed, ascending."""
        plan = request.plan
        seen = visible_positions(plan, layer, head, query)
        keep = kept_of_group(plan, layer, head)
        if keep is not None:
            block = query // plan.page_size
            for group in range(groups_in_front(plan, layer, head, block)):
                tokens = tokens_of_group(plan, layer, head, group)
                seen += kept_positions(layer, head, tokens, keep)
        return sorted(seen)

    def _shape(self, step: StepRows, layer: int) -> RowShapes:
        return step.shapes[step.shape_of_layer[layer]]

    def _keys(self, layer: int, pages: list[int], seq_len: int) -> list[Label]:
        size, per_page = self._plan.page_size, self._heads[layer].per_page
        tokens = range(seq_len)
        places = [(*divmod(pages[j // size], per_page), j % size) for j in tokens]
        return [self._content[place] for place in places]

    def _place(
        self, query: int, num_decodes: int, num_tokens: int, heads: int
    ) -> tuple[int, int]:
        """Token and head of a query: decode token-major, prefill head-major."""
        if query < num_decodes * heads:
            return query // heads, query % heads
        head, token = divmod(query - num_decodes * heads, num_tokens - num_decodes)
        return num_decodes + token, head

    def _copy(self, layer: int, batch: Batch, step: StepRows) -> None:
        if not step.copies:
            return
        source, target = (pages.tolist() for pages in step.copies[layer])
        assert len(source) == len(target) == len(set(target))
        held = [page for request in batch.requests for page in request.pages]
        assert all(1 <= page <= self._num_scratch for page in source)
        assert set(target) <= set(held)
        per_page, size = self._heads[layer].per_page, self._plan.page_size
        for place in itertools.product(range(per_page), range(size)):
            moved = [self._content.get((page, *place)) for page in source]
            for page, label in zip(target, moved, strict=True):
                if label is None:
                    self._content.pop((page, *place), None)
                else:
                    self._content[page, *place] = label

    def _check_retained(self, layer: int, batch: Batch) -> None:
        """Check that a layer's lanes hold what the plan says they retain."""
        for request, tokens in zip(batch.requests, batch.seq_lens, strict=True):
            pages = set(request.pages)
            held = {
                label for (page, *_), label in self._content.items() if page in pages
            }
            assert self._retained(layer, request, int(tokens)) <= held

    def _retained(self, layer: int, request: Request, tokens: int) -> set[Label]:
        """What the next query will see, and what is there already."""
        return {
            self._label(request, layer, head, position)
            for head, lane in enumerate(self._heads[layer].lane_of_head)
            for position in self._visible(request, layer, lane, tokens)
            if position < tokens
        }


@lru_cache(1 << 16)
def kept_positions(layer: int, head: int, group: range, keep: int) -> tuple[int, ...]:
    """What a policy keeps of a group: any choice, the same at all times."""
    return tuple(sorted(Random(f"{layer} {head} {group.start}").sample(group, keep)))
