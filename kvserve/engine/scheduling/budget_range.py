# SPDX-License-Identifier: Apache-2.0
"""Gives each request the largest budget of a range for which there is room.

A request that waits gets the largest with which all that could run beside it fit as
well, each with its prompt and the longest reply that it may get; if not even the least
lets all of them in, the least. What it gets when it begins it keeps: what it has read
follows from it, so one that is preempted comes back to the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.extra_args import LEVEL, PROTECT, said_in
from kvserve.plan.mixed import MixedRule
from kvserve.plan.protection import parse_spans, protecting
from kvserve.plan.request_policies import level_of, names_policy

_MOST_KNOWN = 4096


class BudgetRange:
    """Of one scheduler, as long as it lives.

    Args:
        most_requests: that may run at a time.
    """

    def __init__(
        self, rule: MixedRule, pages: HeadPagedManager, most_requests: int
    ) -> None:
        self._rule, self._pages, self._most = rule, pages, most_requests
        self._known: dict[tuple[int, int, str | None], tuple[int, int]] = {}
        self._begun: set[str] = set()

    def forget(self, request_id: str) -> None:
        """Drop a request that will not come back."""
        self._begun.discard(request_id)

    def note_begun(self, requests: Iterable[NewRequestData]) -> None:
        """Count requests that are computed for the first time, by what they got."""
        for one in requests:
            own = names_policy(self._rule, one.sampling_params)
            if not own and one.req_id not in self._begun:
                level = level_of(self._rule, one.sampling_params)
                self._pages.ledger.given[level] += 1
            self._begun.add(one.req_id)

    def share_out(
        self, waiting: Iterable[Request], running: Iterable[Request]
    ) -> list[Request]:
        """Choose the budget of requests that have not begun.

        Args:
            waiting: in the order in which they will be let in.

        Returns:
            Those whose budget is another one than before.
        """
        running = list(running)
        could_run = list(islice(waiting, max(self._most - len(running), 0)))
        settled = [one for one in could_run if self._is_settled(one)]
        new = [one for one in could_run if not self._is_settled(one)]
        if not new:
            return []
        free = self._pages.block_pool.get_num_free_blocks()
        free -= sum(map(self._missing, [*running, *settled]))
        level = self._level_for(new, free)
        rule = self._rule
        changed = [one for one in new if level_of(rule, one.sampling_params) != level]
        for one in changed:
            _note(one, level)
        return changed

    def _is_settled(self, request: Request) -> bool:
        """Whether a request has begun, or names a policy itself."""
        has_begun = request.num_preemptions > 0 or request.request_id in self._begun
        return has_begun or names_policy(self._rule, request.sampling_params)

    def _level_for(self, requests: list[Request], free: int) -> int:
        last = len(self._rule.levels) - 1
        for level in range(last):
            needs = [self._needed(level, request) for request in requests]
            # The tokens under way are those of one step, whose requests share them.
            under_way = max(reading - alone for alone, reading in needs)
            if sum(alone for alone, _ in needs) + under_way <= free:
                return level
        return last

    def _needed(self, level: int, request: Request) -> tuple[int, int]:
        """Pages of a request on its way to its end.

        Returns:
            Those it needs if it comes token by token, and in steps of full length.
        """
        length, spans = self._length(request), said_in(request.sampling_params, PROTECT)
        key = level, length, spans
        if key not in self._known:
            rule = self._rule.levels[level]
            if spans is not None:
                rule = protecting(rule, parse_spans(spans))
            plan = rule.plan(length)
            steps = 1, self._rule.in_flight
            alone, reading = (plan.most_pages(length, tokens) for tokens in steps)
            if len(self._known) >= _MOST_KNOWN:  # clients name spans without end
                self._known.clear()
            self._known[key] = alone, reading
        return self._known[key]

    def _missing(self, request: Request) -> int:
        """Pages that a request whose plan is settled will need beyond those it holds.

        While it reads it may hold more, which it gives back.
        """
        name = request.request_id
        needed = self._pages.plan_of(name).most_pages(self._length(request))
        return needed - self._pages.pages_held(name)

    def _length(self, request: Request) -> int:
        return min(
            request.num_prompt_tokens + request.max_tokens, self._rule.max_tokens
        )


def _note(request: Request, level: int) -> None:
    """Write the level where scheduler and worker read it."""
    # Samples of one request may share their parameters.
    params = copy.copy(request.sampling_params)
    assert params is not None
    params.extra_args = {**(params.extra_args or {}), LEVEL: level}
    request.sampling_params = params
