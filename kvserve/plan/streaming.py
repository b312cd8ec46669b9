# SPDX-License-Identifier: Apache-2.0
"""What makes the page plan of each request, under a policy of positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from kvserve.errors import UserError
from kvserve.plan.blocks import NOT_THINNED
from kvserve.plan.layout import layout_of
from kvserve.plan.page_plan import PagePlan
from policies.base import HeadBudget, ModelShape, StreamingPolicy
from policies.files import follows_files

NOTHING_OPEN = (
    "every layer of this model sees a window of its own: no policy can keep less"
)


@dataclass(frozen=True)
class StreamRule:
    """The plan of every request under a policy of positions.

    Travels inside the KV cache spec. Only under an *elastic* policy do requests of
    unequal length have unequal plans. ``model`` is the whole model, of whose heads
    each of ``ranks`` ranks owns some. Blocks are counted in turns of ``stride``, if the
    tables of a server have it so. ``in_flight`` is the most tokens that are scheduled
    and not yet computed: until they are, requests that give pages back hold more.
    ``is_shared`` says whether requests share the pages of a common prefix. The first
    ``protected`` tokens stay in all lanes, and tokens of ``spans``, each a first one
    and the first behind, before others where lanes are thinned. Of ``lookahead`` tokens
    of a step it is not known yet whether the request has them.
    """

    policy: StreamingPolicy
    model: ModelShape
    page_size: int
    max_tokens: int
    ranks: int = 1
    stride: int | None = None
    in_flight: int = 1
    is_shared: bool = False
    protected: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    lookahead: int = 0
    mixed: ClassVar = False
    may_select: ClassVar = False
    weighs: ClassVar = False
    observed: ClassVar = 0

    @property
    def copies(self) -> int:
        """Ranks that have the lanes of a plan: it names the heads of all of them."""
        return 1

    @property
    def is_elastic(self) -> bool:
        """Whether requests have plans of their own."""
        return self.policy.capabilities.elastic

    @property
    def longest(self) -> PagePlan:
        """The plan of the longest request, which needs most."""
        return self.plan(self.max_tokens)

    @property
    def largest(self) -> PagePlan:
        """The plan that needs most of all that requests may have."""
        return self.longest

    @property
    def full(self) -> PagePlan:
        return self.longest.full

    @property
    def has_bounded_lanes(self) -> bool:
        return self.is_elastic or self.longest.has_bounded_lanes

    def plan(self, tokens: int) -> PagePlan:
        """Return the plan of a request that may become ``tokens`` tokens long."""
        elastic = self.policy.capabilities.elastic
        return _plan(self, min(tokens, self.max_tokens) if elastic else None)

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> PagePlan:
        """Return the plan of a request by its prompt and its longest reply."""
        return self.plan(prompt_tokens + reply_tokens)

    def pages(self, tokens: int) -> int:
        """Pages that a request of ``tokens`` tokens, reply included, ends with."""
        return self.plan(tokens).pages(tokens)

    def most_pages(self, tokens: int) -> int:
        """Pages that a request needs on its way to ``tokens`` tokens."""
        return self.plan(tokens).most_pages(tokens, self.in_flight)

    def least_pool(self, tokens: int) -> int:
        """Pages of a pool that can serve any request of ``tokens`` tokens."""
        return self.most_pages(tokens)

    def most_entries(self, tokens: int) -> int:
        """The longest page list of any request of ``tokens`` tokens."""
        return self.largest.entries(tokens)

    def history_pages(self, tokens: int) -> int:
        """The most pages that one lane's history has, in a request of ``tokens``."""
        return self.largest.history_pages(tokens)

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        bounded = self.has_bounded_lanes
        return scratch_pages(self.longest, max_tokens, max_requests, bounded)

    def describe(self) -> str:
        """Say in one line what the lanes of the longest request keep."""
        return describe(self.longest)

    def remarks(self) -> list[str]:
        """What else a user should know when the server starts."""
        decides = self.model.open.num_layers > 0
        remark = self.policy.remark(self.model.open) if decides else NOTHING_OPEN
        said = remark, self._imbalance(), self._given_back()
        return [line for line in said if line]

    def _given_back(self) -> str:
        """Say what it costs that no page is written over, if anything."""
        alone = replace(self, is_shared=False, lookahead=0)
        tokens = self.max_tokens
        more = self.most_pages(tokens) - alone.most_pages(tokens)
        if more <= 0:
            return ""
        why, way_out = "prefixes are shared", " (--no-enable-prefix-caching: none)"
        if self.lookahead:
            why, way_out = "tokens are guessed", ""
        return (
            f"{why}, so pages are given back instead of written over: up to {more} "
            f"more while prompts are read{way_out}"
        )

    def _imbalance(self) -> str:
        """Say what it costs that ranks own heads in the model's order."""
        if self.ranks == 1:
            return ""
        excess = self.longest.imbalance(self.max_tokens)
        return (
            f"of {self.ranks} ranks the one that holds most decides: {excess:.2f} "
            f"times an even share at {self.max_tokens} tokens"
        )


@follows_files
@lru_cache(maxsize=64)
def _plan(rule: StreamRule, tokens: int | None) -> PagePlan:
    length = rule.max_tokens if tokens is None else tokens
    open_layers = rule.model.open
    budgets = rule.policy.budgets(open_layers, length) if open_layers.num_layers else ()
    if rule.protected:
        budgets = _protecting(budgets, rule.protected)
    sizes = rule.page_size, length
    plan = plan_of_model(rule.model, budgets, *sizes, rule.ranks, rule.is_shared)
    plan = replace(plan, spans=rule.spans, lookahead=rule.lookahead)
    return plan if rule.stride is None else _in_turns(plan, rule.stride)


def _protecting(
    budgets: tuple[tuple[HeadBudget, ...], ...], tokens: int
) -> tuple[tuple[HeadBudget, ...], ...]:
    """The same budgets, whose sinks are ``tokens`` at least."""
    return tuple(
        tuple(
            head if head.is_full else replace(head, sinks=max(head.sinks, tokens))
            for head in layer
        )
        for layer in budgets
    )


def plan_of_model(
    model: ModelShape,
    budgets: tuple[tuple[HeadBudget, ...], ...],
    page_size: int,
    tokens: int,
    ranks: int = 1,
    shared: bool = False,
) -> PagePlan:
    """Make the plan of a request that may become ``tokens`` tokens long.

    Args:
        budgets: of the layers that are not local, ``[layers][num_kv_heads]``.
    """
    plan = PagePlan.from_budgets(
        budgets,
        page_size,
        tokens,
        ranks,
        shared,
        model.local,
        model.num_kv_heads,
        layout_of(model),
    )
    return replace(plan, reread=model.reread)


def _in_turns(plan: PagePlan, stride: int) -> PagePlan:
    """Count the blocks of a plan without shards in turns of ``stride``."""
    if plan.stride == stride:
        return plan
    if plan.shards:
        raise UserError(
            f"--policy: its shards come in turns of {plan.stride} pages, but the "
            f"server was started for turns of {stride}"
        )
    return replace(plan, stride=stride)


def scratch_pages(
    plan: PagePlan, max_tokens: int, max_requests: int, bounded: bool | None = None
) -> int:
    """Pages that one step's prefill may need beside what requests hold.

    A chunk's blocks that would overwrite ring slots still needed by the chunk's own
    early queries are kept here until attention is done. An area serves one layer at a
    time; each layer whose lanes later ones read has an area of its own. Of a chunk of
    ``t`` tokens at most ``(t - 1 + page_size - 1) // page_size`` blocks are new to it,
    and a chunk of one token needs none.

    Args:
        max_tokens: tokens that one step may schedule.
        max_requests: requests that one step may schedule.
        bounded: whether requests have bounded lanes, where they have other plans.
    """
    bounded = plan.has_bounded_lanes if bounded is None else bounded
    if not bounded or not plan.recycles:
        return 0
    chunks = min(max_requests, max_tokens // 2)
    blocks = max_tokens // plan.page_size + chunks
    return blocks * plan.heads_per_rank * (1 + len(plan.reread))


def describe(plan: PagePlan) -> str:
    """Say in one line what the lanes keep, in tokens as rounded to pages."""
    shards = plan.shards or plan.full.sinks
    kinds: Counter[tuple[int, int, int]] = Counter()
    seen: Counter[str] = Counter()
    heads = [one.kv_heads for one in plan.layout]
    heads = heads or [plan.num_kv_heads] * plan.num_layers
    of_lanes = plan.sinks, plan.windows, shards
    layers = zip(plan.local_by_layer, heads, *of_lanes, strict=True)
    for kind, count, *lanes in layers:
        if kind:
            seen[f"see {kind}, as the model has it"] += count
            continue
        for sinks, window, kept in zip(*(lane[:count] for lane in lanes), strict=True):
            kinds[sinks, window, kept.bit_count()] += 1
    parts = [
        f"{count} keep {_describe_lane(plan, *lane)}"
        for lane, count in sorted(kinds.items())
    ]
    parts += [f"{count} {kind}" for kind, count in sorted(seen.items())]
    return (
        f"of {sum(heads)} KV heads {'; '.join(parts)} "
        f"(pages of {plan.page_size} tokens{_describe_history(plan)})"
    )


def _describe_history(plan: PagePlan) -> str:
    """Say what is left between sinks and window of heads that are thinned."""
    keeps = sorted({kept for row in plan.keep for kept in row} - {NOT_THINNED})
    if not keeps:
        return ""
    few = f"{keeps[0]} to {keeps[-1]}" if len(keeps) > 1 else f"{keeps[0]}"
    return f"; of each {plan.group * plan.page_size} between, heads keep {few}"


def _describe_lane(plan: PagePlan, sinks: int, window: int, shards: int) -> str:
    size = plan.page_size
    if not window:
        return "everything"
    if shards:
        return f"{window * size} recent tokens + {shards} of {plan.stride} pages"
    return f"{sinks * size} sinks + {window * size} recent tokens"
