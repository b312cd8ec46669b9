# SPDX-License-Identifier: Apache-2.0
"""What requests have seen and kept: the books of the scheduler process.

While a request runs, one number is noted a step: its tokens. All else follows from its
page plan and is worked out when somebody asks, or when the request ends.

An *entry* is what one KV head of one layer keeps of one token.
"""

from __future__ import annotations

import re
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from kvserve.plan.lanes import IntArray
from kvserve.plan.page_plan import PagePlan
from policies.base import Policy
from policies.registry import changed_arguments

_BEAM = re.compile(r"(?P<search>.+)-(?P<step>[0-9a-f]{32})-beam-\d+(-[0-9a-f]{8})?")
"""What vLLM calls a beam: each step of a search has beams of its own."""

MOST_RECEIPTS = 512
"""Receipts of the last requests that are kept."""


class LanePlan(Protocol):
    """A page plan, as far as the books need it."""

    def lane_tokens(self, tokens: int) -> IntArray:
        """Tokens in each lane of a request of ``tokens`` tokens."""


@dataclass(frozen=True)
class Receipt:
    """What a request held when its pages went back to the pool.

    Attributes:
        request_id: the engine's name of the request.
        finished: when it ended, in seconds since 1970.
        tokens_seen: tokens that it read or wrote and that went through the cache.
        entries_seen: what a cache that evicts nothing would have held.
        entries_retained: what its lanes held at the end.
        pages_held: its pages at the end.
        pages_peak: the most pages it ever held.
        pages_full: pages of a cache that evicts nothing.
        policy: the name of its policy.
        arguments: those that are not the policy's defaults.
        protected: spans of tokens that it had protected, ``FIRST-BEHIND`` with commas.
        tokens_cached: tokens that were read already when it last began.
    """

    request_id: str
    finished: float
    tokens_seen: int
    entries_seen: int
    entries_retained: int
    pages_held: int
    pages_peak: int
    pages_full: int
    policy: str = ""
    arguments: str = ""
    protected: str = ""
    tokens_cached: int = 0

    @property
    def entries_evicted(self) -> int:
        return self.entries_seen - self.entries_retained


@dataclass
class Ended:
    """What the requests of one policy that ended had seen and kept, added up."""

    requests: int = 0
    entries_seen: int = 0
    entries_retained: int = 0


class Ledger:
    """Tokens of running requests, receipts of ended ones, and a count of evictions.

    Attributes:
        tokens: of every request that holds pages; the manager writes it at each step.
        ended: totals by policy, where the scheduler says which requests ended.
        given: requests that began with each budget of a range, by its place in it.

    Args:
        full: the plan of a request that evicts nothing.
        copies: ranks that each have such heads, and all the same plan.
    """

    def __init__(
        self, full: PagePlan, copies: int = 1, most_receipts: int = MOST_RECEIPTS
    ) -> None:
        self.tokens: dict[str, int] = {}
        self.ended: defaultdict[str, Ended] = defaultdict(Ended)
        self.given: Counter[int] = Counter()
        self._full, self._copies, self._most = full, copies, most_receipts
        self._peaks: dict[str, int] = {}
        self._cached: dict[str, int] = {}
        self._receipts: OrderedDict[str, Receipt] = OrderedDict()
        self._evicted = 0

    def grown(self, request_id: str, pages: int) -> None:
        """Note that a request was given pages; it now holds ``pages``."""
        # A preempted request that comes back has not ended after all.
        self._receipts.pop(request_id, None)
        self._peaks[request_id] = max(pages, self._peaks.get(request_id, 0))

    def begun(self, request_id: str, cached: int) -> None:
        """Note how many tokens a request found cached when it began or resumed."""
        self._cached[request_id] = cached

    def close(
        self,
        request_id: str,
        plan: LanePlan,
        pages: int,
        policy: Policy | None = None,
        protected: str = "",
    ) -> None:
        """Write the receipt of a request that gives its ``pages`` pages back."""
        tokens = self.tokens.pop(request_id, None)
        peak = self._peaks.pop(request_id, pages)
        cached = self._cached.pop(request_id, 0)
        if tokens is None:
            return
        receipt = Receipt(
            request_id,
            time.time(),
            tokens,
            int(self._full.lane_tokens(tokens).sum()) * self._copies,
            int(plan.lane_tokens(tokens).sum()) * self._copies,
            pages,
            peak,
            self._full.pages(tokens),
            policy.name if policy else "",
            changed_arguments(policy) if policy else "",
            protected,
            cached,
        )
        self._evicted += receipt.entries_evicted
        self._forget_last_step(request_id)
        self._receipts[request_id] = receipt
        while len(self._receipts) > self._most:
            self._receipts.popitem(last=False)

    def _forget_last_step(self, request_id: str) -> None:
        """Keep of a beam search the last step alone, which has all tokens of it.

        Else a search of some hundred tokens would push out the receipts of everybody.
        """
        beam = _BEAM.fullmatch(request_id)
        if beam is None:
            return
        search, step = beam["search"], beam["step"]
        for known in [*self._receipts]:
            other = _BEAM.fullmatch(known)
            if other and other["search"] == search and other["step"] != step:
                del self._receipts[known]

    def end(self, request_id: str) -> None:
        """Count a request, closed before, that was not merely preempted."""
        receipt = self._receipts.get(request_id)
        if receipt is not None:
            totals = self.ended[receipt.policy]
            totals.requests += 1
            totals.entries_seen += receipt.entries_seen
            totals.entries_retained += receipt.entries_retained

    def receipts(self, alive: Container[str]) -> list[Receipt]:
        """Return receipts, the last to end first.

        Args:
            alive: requests that have not ended: those that were preempted and wait.
        """
        ended = reversed(self._receipts.values())
        return [receipt for receipt in ended if receipt.request_id not in alive]

    def evicted(self, running: int) -> int:
        """Count the entries evicted since the start, ``running`` of them just now."""
        return self._evicted + running
