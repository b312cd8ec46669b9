# SPDX-License-Identifier: Apache-2.0
"""The interface of plans: what the engine and the routes know of either family.

A policy of positions has a :class:`~kvserve.plan.streaming.StreamRule` and plans of
:class:`~kvserve.plan.page_plan.PagePlan`, one that selects after a dense prefill a
:class:`~kvserve.plan.dense.DenseRule` and :class:`~kvserve.plan.dense.DensePlan`. Where
requests may have rules of their own, a :class:`~kvserve.plan.mixed.MixedRule` makes the
rule of each. Nothing outside of ``kvserve.plan`` asks which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from kvserve.errors import UserError
from kvserve.plan.dense import DenseRule
from kvserve.plan.lanes import IntArray
from kvserve.plan.mixed import MixedRule
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.refusals import (
    check_dense,
    check_guesses,
    check_ranks,
    check_unequal,
)
from kvserve.plan.streaming import StreamRule
from policies.base import DensePolicy, ModelShape, Policy, StreamingPolicy


class RequestPlan(Protocol):
    """The pages of one request: pure functions of its number of tokens.

    A *page list* only grows; entries that are given back become null.
    """

    @property
    def reading(self) -> PagePlan:
        """By which the page list grows while the prompt is read."""

    def of_rank(self, rank: int) -> RequestPlan:
        """The plan of a rank's own heads."""

    @property
    def digest(self) -> str:
        """A name for what pages hold, beside the text that they hold it of."""

    def entries(self, tokens: int) -> int:
        """Length of the page list, null entries included."""

    def pages(self, tokens: int) -> int:
        """Pages held once ``tokens`` are computed and what can be is given back."""

    def most_pages(self, tokens: int, in_flight: int = 1) -> int:
        """Pages needed on the way there, ``in_flight`` tokens under way at a time."""

    def lane_tokens(self, tokens: int) -> IntArray:
        """Tokens that each lane holds, ``[num_layers, num_kv_heads]``."""

    def given_back(self, before: int, now: int) -> IntArray:
        """List entries that no query needs any more.

        Args:
            before, now: tokens that were computed when somebody last asked, and are.

        Returns:
            Indices, the last first: the first that a pool should give out again.
        """

    def owed(self, entries: int) -> int:
        """Pages that the request must still get before it can give any back."""

    def is_reading(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` tokens holds a full cache for now."""

    def chunk(self, start: int, new_tokens: int) -> int:
        """How many of ``new_tokens`` to compute now; 0 waits for a larger budget."""

    def bounds(self) -> tuple[IntArray, IntArray] | None:
        """Sinks and window of each lane in tokens, if positions decide; 0: all."""


class Rule(Protocol):
    """What makes the plan of each request. Travels inside the KV cache spec."""

    @property
    def policy(self) -> Policy:
        """The server's, or that which a request names."""

    @property
    def model(self) -> ModelShape:
        """The model that plans are made for: :attr:`copies` ranks have one each."""

    @property
    def page_size(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...

    @property
    def copies(self) -> int:
        """Ranks that each have the lanes of a plan."""

    @property
    def mixed(self) -> bool:
        """Whether a request may name a policy of its own."""

    @property
    def is_shared(self) -> bool:
        """Whether requests share the pages of a common prefix."""

    @property
    def in_flight(self) -> int:
        """The most tokens that are scheduled and not yet computed."""

    @property
    def is_elastic(self) -> bool:
        """Whether requests have plans of their own."""

    @property
    def observed(self) -> int:
        """Last tokens of a prompt that must be read in one chunk."""

    @property
    def has_bounded_lanes(self) -> bool:
        """Whether a lane of some request may keep less than it is given as it reads."""

    @property
    def may_select(self) -> bool:
        """Whether requests may select: then plans say where chunks of a prompt end."""

    @property
    def weighs(self) -> bool:
        """Whether a policy may ask for the attention that tokens draw."""

    @property
    def full(self) -> PagePlan:
        """The plan of a request that evicts nothing."""

    @property
    def largest(self) -> PagePlan:
        """The plan that needs most of all that requests may have."""

    def plan(self, tokens: int) -> RequestPlan:
        """The plan of a request that may become ``tokens`` tokens long."""

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> RequestPlan:
        """The plan of a request by its prompt and its longest reply."""

    def pages(self, tokens: int) -> int:
        """Pages with which a request of ``tokens`` tokens ends."""

    def most_pages(self, tokens: int) -> int:
        """Pages that a request needs on its way to ``tokens`` tokens."""

    def least_pool(self, tokens: int) -> int:
        """Pages of a pool that can serve any request of ``tokens`` tokens."""

    def most_entries(self, tokens: int) -> int:
        """The longest page list of any request of ``tokens`` tokens."""

    def history_pages(self, tokens: int) -> int:
        """The most pages that one lane's history has, in a request of ``tokens``."""

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        """Pages that a step's prefill may need beside what requests hold.

        Args:
            max_tokens, max_requests: that one step may schedule.
        """

    def describe(self) -> str:
        """Say in one line what is kept."""

    def remarks(self) -> list[str]:
        """What else a user should know when the server starts."""


def rule_under(
    policy: Policy,
    model: ModelShape,
    page_size: int,
    max_tokens: int,
    *,
    ranks: int = 1,
    in_flight: int = 1,
    shared: bool = False,
    mixed: bool = False,
    step_tokens: int = 0,
    richer: Sequence[Policy] = (),
    protects: bool = False,
    lookahead: int = 0,
) -> Rule:
    """Return what makes the plan of each request under ``policy``.

    Args:
        model: the whole model, whatever ranks share it.
        in_flight: the most tokens under way at a time.
        shared: whether requests share pages, under policies that can.
        mixed: whether a request may name another policy.
        step_tokens: tokens of one prompt that any step can read at once.
        richer: the policy with larger budgets, the largest first, which requests get
            while there is room.
        protects: whether a request may have tokens protected.
        lookahead: tokens of a step of which it is not known whether a request has them.

    Raises:
        UserError: the policy cannot serve the model, or not on so many ranks.
    """
    if lookahead:
        check_guesses(policy, model, ranks, mixed, protects, bool(richer))
    if ranks > 1:
        check_ranks(policy, model, ranks)
    if model.layer_heads:
        check_unequal(policy, model, ranks, mixed, protects, bool(richer))
    rule: StreamRule | DenseRule
    levels: tuple[StreamRule, ...] = ()
    if isinstance(policy, DensePolicy):
        check_dense(policy, ranks, mixed, protects, bool(richer))
        # Every rank selects among its own heads, and all have lanes of equal length.
        share = dataclasses.replace(
            model,
            num_query_heads=model.num_query_heads // ranks,
            num_kv_heads=model.num_kv_heads // ranks,
        )
        rule = DenseRule(policy, share, page_size, max_tokens, ranks)
    elif isinstance(policy, StreamingPolicy):
        shape = model, page_size, max_tokens, ranks
        steps = in_flight, shared and policy.capabilities.prefix_cacheable
        rule = StreamRule(policy, *shape, None, *steps, lookahead=lookahead)
        if richer:
            levels = _levels_above(rule, richer)
    else:
        raise UserError(
            f"--policy {policy.name}: is neither a StreamingPolicy nor a DensePolicy"
        )
    rule.plan(max_tokens)  # refuses a model that the policy cannot serve
    if not (mixed or levels or protects):
        return rule
    return MixedRule(rule, step_tokens, mixed, levels, protects)


def _levels_above(
    least: StreamRule, richer: Sequence[Policy]
) -> tuple[StreamRule, ...]:
    """Rules of a range of budgets, whose lanes have tables in common."""
    stride, levels = least.longest.stride, []
    for policy in richer:
        assert isinstance(policy, StreamingPolicy)
        level = dataclasses.replace(least, policy=policy)
        if level.longest.stride != stride:
            raise UserError(
                f"--policy {policy.name}: budgets of a range count pages in turns of "
                f"{level.longest.stride} and {stride}; give one budget"
            )
        levels.append(level)
    return *levels, least
