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

from vllm.v1.request import Request

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.extra_args import LEVEL, said_in
from kvserve.plan.mixed import MixedRule


class BudgetRange:
    """Of one scheduler, as long as it lives.

    Args:
        most_requests: that may run at a time.
    """

    def __init__(
        self, rule: MixedRule, pages: HeadPagedManager, most_requests: int
    ) -> None:
        self._rule, self._pages, self._most = rule, pages, most_requests
        self._known: dict[tuple[int, int], tuple[int, int]] = {}
        self._begun: set[str] = set()

    def forget(self, request_id: str) -> None:
        """Drop a request that will not come back."""
        self._begun.discard(request_id)

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
        self._begun.update(one.request_id for one in running)
        could_run = list(islice(waiting, max(self._most - len(running), 0)))
        begun = [one for one in could_run if self._has_begun(one)]
        new = [one for one in could_run if not self._has_begun(one)]
        if not new:
            return []
        free = self._pages.block_pool.get_num_free_blocks()
        free -= sum(map(self._missing, [*running, *begun]))
        level = self._level_for([self._length(one) for one in new], free)
        changed = [one for one in new if _level_of(one) != level]
        for one in changed:
            _note(one, level)
        return changed

    def _has_begun(self, request: Request) -> bool:
        return request.num_preemptions > 0 or request.request_id in self._begun

    def _level_for(self, lengths: list[int], free: int) -> int:
        last = len(self._rule.levels) - 1
        for level in range(last):
            needs = [self._needed(level, length) for length in lengths]
            # The tokens under way are those of one step, whose requests share them.
            under_way = max(reading - alone for alone, reading in needs)
            if sum(alone for alone, _ in needs) + under_way <= free:
                return level
        return last

    def _needed(self, level: int, length: int) -> tuple[int, int]:
        """Pages of a request on its way to ``length`` tokens.

        Returns:
            Those it needs if it comes token by token, and in steps of full length.
        """
        key = level, length
        if key not in self._known:
            plan = self._rule.levels[level].plan(length)
            steps = 1, self._rule.in_flight
            alone, reading = (plan.most_pages(length, tokens) for tokens in steps)
            self._known[key] = alone, reading
        return self._known[key]

    def _missing(self, request: Request) -> int:
        """Pages that a request which has begun will yet need beyond those it holds.

        While it reads it may hold more, which it gives back.
        """
        name = request.request_id
        needed = self._pages.plan_of(name).most_pages(self._length(request))
        return needed - self._pages.pages_held(name)

    def _length(self, request: Request) -> int:
        return min(
            request.num_prompt_tokens + request.max_tokens, self._rule.max_tokens
        )


def _level_of(request: Request) -> int | None:
    level: int | None = said_in(request.sampling_params, LEVEL)
    return level


def _note(request: Request, level: int) -> None:
    """Write the level where scheduler and worker read it."""
    # Samples of one request may share their parameters.
    params = copy.copy(request.sampling_params)
    assert params is not None
    params.extra_args = {**(params.extra_args or {}), LEVEL: level}
    request.sampling_params = params
