# SPDX-License-Identifier: Apache-2.0
"""The page plan of policies that select after a dense prefill.

While its prompt is read, a request holds every page of a full cache. When the last
prompt token has been attended to, each lane's survivors move to the front of its page
list, lane by lane, and the rest of the list is freed. Generated tokens then open pages
behind it. All counts follow from the policy's lanes, the prompt's length and the
number of generated tokens, so scheduler and worker agree without a message; which
tokens survive, and for which head, only the worker knows.

A page list has three parts, whose entries never change their meaning:

* ``[0, kept)``: the survivors' pages, ``blocks_of(keep)`` of each lane in turn;
* ``[kept, prompt)``: freed after the prompt, null from then on;
* ``[prompt, ...)``: pages opened for generated tokens, in the order of opening.

Lanes of layers that are local by the model itself hold their window while the prompt is
read; behind it, the last tokens of it, in a ring: the same set of keys.

A prompt whose lanes keep everything, and every generated token too, skips all this:
its list is that of a full cache for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from kvserve.errors import UserError
from kvserve.plan.blocks import UNBOUNDED
from kvserve.plan.lanes import BoolArray, IntArray
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import NOTHING_OPEN, plan_of_model, scratch_pages
from policies.base import FULL, DensePolicy, Lane, Local, ModelShape
from policies.files import follows_files


@dataclass(frozen=True)
class DensePlan:
    """Pages of a request whose prompt has ``prompt_tokens`` tokens."""

    rule: DenseRule
    prompt_tokens: int
    lanes: tuple[tuple[Lane, ...], ...]

    @property
    def page_size(self) -> int:
        return self.rule.page_size

    @property
    def full(self) -> PagePlan:
        return self.rule.full

    @property
    def reading(self) -> PagePlan:
        """By which the page list grows while the prompt is read."""
        return self.full

    def of_rank(self, rank: int) -> DensePlan:
        """The plan of a rank's own heads: all have the same."""
        return self

    @property
    def digest(self) -> str:
        raise AssertionError("pages of prompts that are selected from are not shared")

    @cached_property
    def keep(self) -> IntArray:
        """Prompt tokens that each lane keeps, ``[num_layers, num_kv_heads]``."""
        return self._by_lane(lambda lane: lane.keep)

    @cached_property
    def capacity(self) -> IntArray:
        """Tokens that each lane can hold, ``[num_layers, num_kv_heads]``."""
        return self._by_lane(_capacity)

    @cached_property
    def ring(self) -> IntArray:
        """Recycled last tokens of ``ring`` lanes, else 0, by lane."""
        return self._by_lane(lambda lane: lane.recent if lane.tail == "ring" else 0)

    @cached_property
    def heavy(self) -> BoolArray:
        """Lanes whose full slots are recycled by score, by lane."""
        return self._by_lane(lambda lane: int(lane.tail == "heavy")) > 0

    @cached_property
    def protected(self) -> IntArray:
        """Last tokens that are safe from eviction, by lane."""
        return self._by_lane(lambda lane: lane.recent)

    @cached_property
    def is_whole(self) -> bool:
        """Whether nothing is ever evicted from this request but what no query sees."""
        chosen = self.rule.model.open.chosen
        of_open = slice(None) if chosen is None else list(chosen)
        kept = (self.keep[of_open] == self.prompt_tokens).all()
        return bool(kept and (self.capacity[of_open] >= self.rule.max_tokens).all())

    def lane_tokens(self, tokens: int) -> IntArray:
        """Tokens in each lane once ``tokens`` are computed, by lane."""
        if tokens < self.prompt_tokens or self.is_whole:
            return self.full.lane_tokens(tokens)
        generated = tokens - self.prompt_tokens
        return np.minimum(self.keep + generated, self.capacity)

    @cached_property
    def prompt_entries(self) -> int:
        """Entries of the page list that belong to the prompt."""
        return self.full.pages(self.prompt_tokens)

    @cached_property
    def kept_entries(self) -> int:
        """Leading entries that are not freed after the prompt."""
        if self.is_whole:
            return self.prompt_entries
        return int(self._kept_blocks.sum())

    def entries(self, tokens: int) -> int:
        """Length of the page list of ``tokens`` tokens, null entries included."""
        if tokens <= self.prompt_tokens or self.is_whole:
            return self.full.pages(tokens)
        blocks = blocks_of_each(self.lane_tokens(tokens), self.page_size)
        return self.prompt_entries + int((blocks - self._kept_blocks).sum())

    def pages(self, tokens: int) -> int:
        """Pages held once ``tokens`` are computed and survivors have moved."""
        freed = self.prompt_entries - self.kept_entries
        return self.entries(tokens) - (freed if tokens >= self.prompt_tokens else 0)

    def most_pages(self, tokens: int, in_flight: int = 1) -> int:
        """Pages that a request needs on its way to ``tokens`` tokens."""
        prompt = self.full.pages(min(tokens, self.prompt_tokens))
        return max(prompt, self.pages(tokens))

    def given_back(self, before: int, now: int) -> IntArray:
        """List entries that are freed once the prompt is read, the last first."""
        if self.is_whole or not before < self.prompt_tokens <= now:
            return np.zeros(0, dtype=np.int64)
        return np.arange(self.kept_entries, self.prompt_entries)[::-1]

    def owed(self, entries: int) -> int:
        """Pages that the prompt is still to take: it gives none back before its end."""
        return max(self.prompt_entries - entries, 0)

    def is_reading(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` tokens holds a full cache for now."""
        return tokens <= self.prompt_tokens and not self.is_whole

    def chunk(self, start: int, new_tokens: int) -> int:
        """How many of ``new_tokens`` to compute now; 0 waits for a larger budget.

        A chunk ends with the prompt, and the last one holds all that is observed. A
        preempted request reads its own output again token by token, as it did the
        first time, so that what it keeps does not depend on having been preempted.

        Args:
            start: tokens computed so far.
        """
        if start >= self.prompt_tokens:
            return min(new_tokens, 1)
        if start + new_tokens >= self.prompt_tokens:
            return self.prompt_tokens - start
        latest = max(self.prompt_tokens - self.rule.observed, start)
        return min(new_tokens, latest - start)

    def bounds(self) -> None:
        """Content decides, not positions."""

    @cached_property
    def kept_slots(self) -> tuple[IntArray, IntArray]:
        """Lane and slot, in pages, of each kept entry: two arrays ``[kept]``.

        Lanes are numbered layer by layer.
        """
        return _runs(np.zeros_like(self._kept_blocks.ravel()), self._kept_blocks)

    @cached_property
    def kept_places(self) -> IntArray:
        """Place of each survivor in the kept pages laid end to end, lane after lane."""
        keep, blocks = self.keep.ravel(), self._kept_blocks.ravel()
        lane, within = _runs(np.zeros_like(keep), keep)
        places: IntArray = (blocks.cumsum() - blocks)[lane] * self.page_size + within
        return places

    @cached_property
    def opened_slots(self) -> tuple[IntArray, IntArray]:
        """Lane and slot of each entry behind the prompt's, as they are opened.

        A lane opens slot ``j`` when it gets its token ``j * page_size + 1``; lanes that
        open together do so in the order of their numbers.
        """
        most = blocks_of_each(self.lane_tokens(self.rule.max_tokens), self.page_size)
        lane, slot = _runs(self._kept_blocks.ravel(), most)
        at = slot * self.page_size + 1 - self.keep.ravel()[lane]
        order = np.argsort(at, kind="stable")
        return lane[order], slot[order]

    @cached_property
    def _kept_blocks(self) -> IntArray:
        return blocks_of_each(self.keep, self.page_size)

    def _by_lane(self, value: Callable[[Lane], int]) -> IntArray:
        return np.array(
            [[value(lane) for lane in layer] for layer in self.lanes], dtype=np.int64
        )


def _capacity(lane: Lane) -> int:
    if lane.tail == "heavy":
        return lane.limit + 1
    return max(lane.keep, lane.limit) if lane.tail == "ring" else UNBOUNDED


def blocks_of_each(tokens: IntArray, page_size: int) -> IntArray:
    """:func:`kvserve.plan.blocks.blocks_of` of each element."""
    blocks: IntArray = -(-tokens // page_size)
    return blocks


def _runs(first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
    """Count from ``first`` to ``last`` (exclusive) for each lane, lane after lane."""
    counts = last.ravel() - first
    lane = np.repeat(np.arange(len(counts)), counts)
    starts = np.repeat(counts.cumsum() - counts - first, counts)
    return lane, np.arange(len(lane)) - starts


@dataclass(frozen=True)
class DenseRule:
    """The plan of every request under a policy: travels inside the KV cache spec.

    Attributes:
        model: as one rank has it.
        copies: ranks that each have such heads, and all the same plan.
        stride: blocks of a turn, as the tables of the server have them.
    """

    policy: DensePolicy
    model: ModelShape
    page_size: int
    max_tokens: int
    copies: int = 1
    stride: int = 1
    mixed: ClassVar = False
    is_shared: ClassVar = False
    in_flight: ClassVar = 1
    may_select: ClassVar = True

    @property
    def is_elastic(self) -> bool:
        """Whether requests have plans of their own."""
        return True

    @property
    def observed(self) -> int:
        return self.policy.observation_window

    @property
    def weighs(self) -> bool:
        """Whether the policy asks for the attention that tokens draw."""
        return "attention mass" in self.policy.capabilities.statistics

    @property
    def full(self) -> PagePlan:
        return _full(self.model, self.page_size, self.max_tokens, self.stride)

    @property
    def has_bounded_lanes(self) -> bool:
        return self.full.has_bounded_lanes

    @property
    def largest(self) -> PagePlan:
        """That of a full cache, which a request holds while it reads its prompt."""
        return self.full

    def pages(self, tokens: int) -> int:
        """Pages that a prompt of ``tokens`` tokens leaves behind."""
        return self.plan(tokens).pages(tokens)

    def most_pages(self, tokens: int) -> int:
        """Pages that a prompt of ``tokens`` tokens needs while it is read."""
        return self.full.pages(tokens)

    def least_pool(self, tokens: int) -> int:
        """Pages of a pool that can serve any request of ``tokens`` tokens."""
        return self.most_pages(tokens)

    def history_pages(self, tokens: int) -> int:
        """None: what is selected stays where it is."""
        return 0

    def most_entries(self, tokens: int) -> int:
        """The longest page list of any request of ``tokens`` tokens.

        Lanes open pages at different times: each may hold one more than the plan.
        """
        return self.full.pages(tokens) + self.full.num_lanes

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        """None where no layer is local: while a prompt is read nothing is given up."""
        return scratch_pages(self.full, max_tokens, max_requests)

    def remarks(self) -> list[str]:
        return [] if self.model.open.num_layers else [NOTHING_OPEN]

    def describe(self) -> str:
        """Say in one line what a long and a short prompt leave behind."""
        lengths = sorted({self.max_tokens // 8 or 1, self.max_tokens})
        shares = [
            f"{self.plan(n).keep.sum() / self.full.lane_tokens(n).sum():.0%} of a "
            f"prompt of {n} tokens"
            for n in lengths
        ]
        return f"keeps {', '.join(shares)} (pages of {self.page_size} tokens)"

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> DensePlan:
        """Return the plan of a request, which its prompt alone decides."""
        return self.plan(prompt_tokens)

    def plan(self, prompt_tokens: int) -> DensePlan:
        """Return the plan of a prompt of this length."""
        return _plan(self, prompt_tokens)


@lru_cache(maxsize=8)
def _full(model: ModelShape, page_size: int, max_tokens: int, stride: int) -> PagePlan:
    everything = ((FULL,) * model.num_kv_heads,) * model.open.num_layers
    plan = plan_of_model(model, everything, page_size, max_tokens)
    return replace(plan, stride=stride)


@follows_files
@lru_cache(maxsize=128)
def _plan(rule: DenseRule, prompt_tokens: int) -> DensePlan:
    model = rule.model
    lanes = (
        rule.policy.lanes(model.open, prompt_tokens) if model.open.num_layers else ()
    )
    of_open = iter(lanes)
    by_layer = tuple(
        (_local_lane(rule, local, prompt_tokens),) * model.num_kv_heads
        if local
        else next(of_open)
        for local in model.local_by_layer
    )
    return DensePlan(rule, prompt_tokens, by_layer)


def _local_lane(rule: DenseRule, local: Local, prompt_tokens: int) -> Lane:
    """What a lane of a local layer holds behind the prompt.

    Raises:
        UserError: what a query sees is no number of last tokens.
    """
    if local.tokens >= rule.max_tokens:
        return Lane(prompt_tokens)
    if local.is_chunk:
        raise UserError(
            f"--policy {rule.policy.name}: layers of {rule.model.name} see {local}, "
            "which policies that select cannot keep; choose a policy of positions, "
            "such as retrieval"
        )
    kept = min(prompt_tokens, local.tokens)
    return Lane(kept, "ring", local.tokens, local.tokens)
