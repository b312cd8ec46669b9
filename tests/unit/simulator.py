# SPDX-License-Identifier: Apache-2.0
"""A tiny scheduler over a fake page pool, for tests of what the worker derives.

It does what vLLM 0.32 does as far as page tables can tell: it cuts prompts into
chunks, skips, finishes, preempts and resumes requests, guesses tokens and takes back
those that are refused, and orders the batch as
``reorder_batch_to_split_decodes_and_prefills`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from kvserve.engine.batch.page_tables import PageTables
from kvserve.plan.blocks import NOT_THINNED
from kvserve.plan.lanes import IntArray, PageArray
from kvserve.plan.layout import LayerHeads
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import scratch_pages
from policies.base import FULL, Local

FULL_LANE = (0, 0)
UNKNOWN_PAGE = -1

LaneSizes = tuple[int, int] | tuple[int, int, int]


def make_plan(
    page_size: int,
    lanes: Sequence[Sequence[LaneSizes]],
    stride: int = 1,
    local: tuple[Local | None, ...] = (),
) -> PagePlan:
    """Build a plan from the lanes of every layer's heads.

    A lane is ``(sinks, window)`` in blocks, with a third number for its shards: a bit
    for each block of a turn of ``stride`` that stays. Those of local layers are what
    these see, whatever is drawn for them.
    """
    full = [[FULL] * len(lanes[0])] * sum(kind is None for kind in local)
    heads = len(lanes[0])
    by_model = PagePlan.from_budgets(
        tuple(map(tuple, full)), page_size, local=local, num_kv_heads=heads
    )
    lanes = [
        [(0, window) for window in by_model.windows[layer]]
        if local and local[layer]
        else own
        for layer, own in enumerate(lanes)
    ]
    whole = [[(*lane, 0)[:3] for lane in layer] for layer in lanes]
    sinks, windows, shards = (
        tuple(tuple(lane[part] for lane in layer) for layer in whole)
        for part in range(3)
    )
    shards = shards if stride > 1 else ()
    return PagePlan(page_size, sinks, windows, stride, shards, local=local)


@st.composite
def plans(draw: st.DrawFn, max_layers: int = 3) -> PagePlan:
    """Draw a small plan: full lanes, windows, shards, or a mixture."""
    layers, heads = draw(st.integers(1, max_layers)), draw(st.integers(1, 3))
    stride = draw(st.sampled_from([1, 1, 2, 3, 4]))
    return draw(plans_of(layers, heads, draw(st.integers(1, 4)), stride))


@st.composite
def plans_of(
    draw: st.DrawFn, layers: int, heads: int, page_size: int, stride: int = 1
) -> PagePlan:
    """Draw a plan of a given shape."""
    shards = st.integers(0, (1 << stride) - 1)
    bounded = st.tuples(st.integers(1, 3), st.integers(1, 3), shards)
    sharded = st.tuples(st.just(0), st.integers(1, 3), shards)
    lane = st.just((*FULL_LANE, 0)) | bounded | sharded
    layer = st.lists(lane, min_size=heads, max_size=heads)
    lanes = draw(st.lists(layer, min_size=layers, max_size=layers))
    window = st.builds(Local, st.integers(1, 10))
    chunk = st.just(Local(draw(st.integers(1, 3)) * page_size, True))
    kinds = st.lists(st.none() | window | chunk, min_size=layers, max_size=layers)
    local = tuple(draw(st.just([]) | kinds))
    return make_plan(page_size, lanes, stride, local)


@st.composite
def thinned_plans(draw: st.DrawFn, max_layers: int = 3) -> PagePlan:
    """Draw a plan with lanes that are thinned, among others."""
    layers, heads = draw(st.integers(1, max_layers)), draw(st.integers(1, 3))
    plan = draw(plans_of(layers, heads, draw(st.integers(1, 4))))
    group, sinks, window = (draw(st.integers(1, 3)) for _ in range(3))
    keeps = st.integers(NOT_THINNED, group * plan.page_size - 1)
    keep = draw(
        st.lists(
            st.lists(keeps, min_size=heads, max_size=heads),
            min_size=layers,
            max_size=layers,
        )
    )
    keep = [
        [NOT_THINNED] * heads if local else row
        for row, local in zip(keep, plan.local_by_layer, strict=True)
    ]
    assume(any(kept != NOT_THINNED for row in keep for kept in row))

    def where_thinned(blocks: int, others: tuple[tuple[int, ...], ...]) -> Blocks:
        return tuple(
            tuple(
                other if kept == NOT_THINNED else blocks
                for kept, other in zip(*row, strict=True)
            )
            for row in zip(keep, others, strict=True)
        )

    return replace(
        plan,
        sinks=where_thinned(sinks, plan.sinks),
        windows=where_thinned(window, plan.windows),
        shards=where_thinned(0, plan.shards) if plan.shards else (),
        group=group,
        keep=tuple(map(tuple, keep)),
    )


Blocks = tuple[tuple[int, ...], ...]


@st.composite
def unequal_plans(draw: st.DrawFn) -> PagePlan:
    """Draw a plan whose layers have heads of unequal number and size."""
    plan = draw(plans())
    of_layer = []
    for layer in range(plan.num_layers):
        local = plan.local[layer] if plan.local else None
        per_page = draw(st.integers(1, 2))
        lanes = draw(st.integers(1, plan.num_kv_heads))
        heads = (
            lanes * per_page - draw(st.integers(0, per_page - 1)) if local else lanes
        )
        of_layer.append(LayerHeads(heads, per_page, together=local is not None))
    return replace(plan, layout=tuple(of_layer))


@st.composite
def reread_plans(draw: st.DrawFn) -> PagePlan:
    """Draw a plan of which later layers read some layers again."""
    plan = draw(plans() | unequal_plans())
    layers = st.sets(st.integers(0, plan.num_layers - 1))
    return replace(plan, reread=tuple(sorted(draw(layers))))


@st.composite
def ranked_plans(draw: st.DrawFn) -> PagePlan:
    """Draw a plan whose heads are dealt to two or three ranks."""
    layers, ranks = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    heads, stride = ranks * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    plan = draw(plans_of(layers, heads, draw(st.integers(1, 4)), stride))
    return replace(plan, ranks=ranks)


@st.composite
def rules(draw: st.DrawFn) -> DrawnRule:
    """Draw plans of one shape, for requests to have different ones."""
    layers, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    stride = draw(st.sampled_from([1, 1, 3]))
    one = plans_of(layers, heads, draw(st.integers(1, 4)), stride)
    return DrawnRule(draw(st.lists(one, min_size=2, max_size=3)))


@dataclass(frozen=True)
class DrawnRule:
    """Gives requests one of some plans, by the length of their prompts."""

    plans: list[PagePlan]

    @property
    def has_bounded_lanes(self) -> bool:
        return any(plan.has_bounded_lanes for plan in self.plans)

    @property
    def page_size(self) -> int:
        return self.plans[0].page_size

    @property
    def full(self) -> PagePlan:
        return self.plans[0].full

    def history_pages(self, tokens: int) -> int:
        return max(plan.history_pages(tokens) for plan in self.plans)

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> PagePlan:
        return self.plans[prompt_tokens % len(self.plans)]


def seeds() -> st.SearchStrategy[Random]:
    """Draw a generator for a schedule: too many draws to make each a choice."""
    return st.integers(0, 2**32 - 1).map(Random)


@dataclass(eq=False)
class Request:
    """A request: ``known`` tokens exist, ``computed`` of them are in the cache.

    ``life`` counts its preemptions: what an earlier life cached is void. ``refused``
    counts the guesses at a position that were not its token.
    """

    name: str
    plan: PagePlan
    prompt: int
    known: int
    final: int
    computed: int = 0
    life: int = 0
    pages: list[int] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)


@dataclass
class Batch:
    """What the worker is told about one step; requests are in row order."""

    requests: list[Request]
    lengths: list[int]
    restarted: list[str]
    page_lists: PageArray

    @property
    def names(self) -> list[str]:
        return [request.name for request in self.requests]

    @property
    def query_start(self) -> IntArray:
        return np.array([0, *self.lengths], dtype=np.int64).cumsum()

    @property
    def seq_lens(self) -> IntArray:
        computed = np.array([r.computed for r in self.requests], dtype=np.int64)
        return computed + self.lengths

    def token_owners(self) -> list[tuple[Request, int]]:
        """Request and position of each token of the step."""
        return [
            (request, request.computed + i)
            for request, length in zip(self.requests, self.lengths, strict=True)
            for i in range(length)
        ]


def refresh(tables: PageTables, batch: Batch) -> None:
    """Bring tables up to date with a batch."""
    computed = batch.seq_lens - np.diff(batch.query_start)
    tables.refresh(batch.names, batch.page_lists, batch.seq_lens, computed)


def page_lists_of(
    requests: list[Request], max_requests: int, max_tokens: int
) -> PageArray:
    """Lay page lists out as vLLM's block table, rubbish beyond what is held."""
    plans = [plan for r in requests for plan in (r.plan, r.plan.full)]
    most = max((plan.entries(max_tokens) for plan in plans), default=0)
    shape = (max_requests, most)
    lists = np.full(shape, UNKNOWN_PAGE, dtype=np.int32)
    for row, request in enumerate(requests):
        lists[row, : len(request.pages)] = request.pages
    return lists


class Scheduler:
    """Draws one batch after the other; ``finish`` ends the step of the last one.

    Where plans look ahead, it guesses as many tokens.
    """

    def __init__(
        self,
        plan: PagePlan | DrawnRule,
        rng: Random,
        max_requests: int = 4,
        max_tokens: int = 40,
        token_budget: int = 24,
    ) -> None:
        self.rule = DrawnRule([plan]) if isinstance(plan, PagePlan) else plan
        self.rng = rng
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.token_budget = token_budget
        self.num_scratch = scratch_of(self.rule, token_budget, max_requests)
        # Two of the longest requests fit: a third one is sometimes preempted.
        longest = max(
            plan.most_pages(max_tokens, token_budget) for plan in self.rule.plans
        )
        self.num_pages = 1 + self.num_scratch + 2 * longest
        self._free = list(range(1 + self.num_scratch, self.num_pages))
        rng.shuffle(self._free)
        self._arrivals = 0
        self._preempted: list[Request] = []
        self._batch: list[Request] = []
        self._restarted: list[str] = []
        self.running: list[Request] = []

    def next_batch(self) -> Batch:
        """Draw which requests run, how many tokens of each and in which rows."""
        self._restarted = []
        if self.running and self.rng.random() < 0.15:
            self._preempt(self.rng.choice(self.running))
        self._admit()
        lengths = self._schedule()
        self._order_rows(lengths)
        return Batch(
            list(self._batch),
            [lengths[request.name] for request in self._batch],
            [name for name in self._restarted if name in lengths],
            page_lists_of(self._batch, self.max_requests, self.max_tokens),
        )

    def finish(self, batch: Batch) -> None:
        """Count the step's tokens, sample a token where due, drop who is done."""
        for request, length in zip(batch.requests, batch.lengths, strict=True):
            before = request.computed
            request.computed += length
            guesses = max(request.computed - request.known, 0)
            request.known += self.rng.randint(0, guesses)
            refused = range(request.known, request.computed)
            request.refused.update(refused)
            request.computed -= len(refused)
            self._give_back(request, before)
            if request.computed < request.known:
                continue
            request.known += 1
            if request.known > request.final:
                self.running.remove(request)
                self._release(request)

    def _admit(self) -> None:
        wanted = self.rng.randint(1, self.max_requests)
        while len(self.running) < wanted:
            if self._preempted and self.rng.random() < 0.7:
                request = self._preempted.pop()
            else:
                prompt = self.rng.randint(1, self.max_tokens)
                final = self.rng.randint(prompt, self.max_tokens)
                name, plan = (
                    f"request-{self._arrivals}",
                    self.rule.of_request(prompt, 0),
                )
                request = Request(name, plan, prompt, prompt, final)
                self._arrivals += 1
            self.running.append(request)
            self._restarted.append(request.name)

    def _schedule(self) -> dict[str, int]:
        lengths: dict[str, int] = {}
        budget = self.token_budget
        for request in list(self.running):
            started = request.name not in self._restarted
            skipped = bool(lengths) and started and self.rng.random() < 0.1
            if budget == 0 or skipped or request not in self.running:
                continue
            length = self._chunk(min(budget, request.known - request.computed))
            length += self._guess(request, length, budget)
            if self._allocate(request, length, lengths):
                lengths[request.name] = length
                budget -= length
        self._requeue_unstarted(lengths)
        return lengths

    def _guess(self, request: Request, length: int, budget: int) -> int:
        """Draw how many tokens to guess behind those that are known."""
        most = min(request.plan.lookahead, self.max_tokens - request.known)
        if not request.computed or request.computed + length < request.known:
            return 0
        return self.rng.randint(0, max(min(most, budget - length), 0))

    def _chunk(self, most: int) -> int:
        kind = self.rng.random()
        if kind < 0.2:
            return 1
        return most if kind < 0.5 else self.rng.randint(1, most)

    def _allocate(self, request: Request, length: int, lengths: dict[str, int]) -> bool:
        """Bring a request to the pages of its plan, at the cost of an unscheduled."""
        missing = request.plan.entries(request.computed + length) - len(request.pages)
        while missing > len(self._free):
            victims = [
                r
                for r in self.running
                if r is not request and r.pages and r.name not in lengths
            ]
            if not victims:
                return False
            self._preempt(victims[-1])
        request.pages += [self._free.pop() for _ in range(missing)]
        return True

    def _requeue_unstarted(self, lengths: dict[str, int]) -> None:
        for request in list(self.running):
            if request.name in self._restarted and request.name not in lengths:
                self.running.remove(request)
                self._preempted.append(request)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.life += 1
        self._preempted.append(request)

    def _release(self, request: Request) -> None:
        self._free += [page for page in request.pages if page]
        self.rng.shuffle(self._free)
        request.pages = []

    def _give_back(self, request: Request, before: int) -> None:
        for entry in request.plan.given_back(before, request.computed).tolist():
            self._free.append(request.pages[entry])
            request.pages[entry] = 0

    def _order_rows(self, lengths: dict[str, int]) -> None:
        """Keep rows where they are, fill gaps, then put one-token extensions first."""
        stay = [r for r in self._batch if r.name in lengths and r in self.running]
        stay += [r for r in self.running if r.name in lengths and r not in stay]
        if self.rng.random() < 0.2:
            self.rng.shuffle(stay)
        self._batch = sorted(stay, key=lambda r: _region(r, lengths[r.name]))


def scratch_of(rule: DrawnRule, max_tokens: int, max_requests: int) -> int:
    """Scratch pages of the plan that needs most."""
    return max(scratch_pages(plan, max_tokens, max_requests) for plan in rule.plans)


def _region(request: Request, length: int) -> int:
    """0: one token after others, 1: longer extension, 2: a first chunk."""
    if request.computed == 0:
        return 2
    return 0 if length == 1 else 1
