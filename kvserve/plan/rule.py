# SPDX-License-Identifier: Apache-2.0
"""The interface of plans: what the engine and the routes know of either family.

A policy of positions has a :class:`~kvserve.plan.streaming.StreamRule` and plans of
:class:`~kvserve.plan.page_plan.PagePlan`, one that selects after a dense prefill a
:class:`~kvserve.plan.dense.DenseRule` and :class:`~kvserve.plan.dense.DensePlan`. Where
requests may name policies, a :class:`MixedRule` makes the rule of each. Nothing outside
of ``kvserve.plan`` asks which.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvserve.errors import UserError
from kvserve.plan.dense import DensePlan, DenseRule
from kvserve.plan.lanes import IntArray
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.refusals import check_ranks, check_unequal, no_mixing
from kvserve.plan.streaming import StreamRule, scratch_pages
from policies.base import DensePolicy, ModelShape, Policy, StreamingPolicy
from policies.thinning import ThinningPolicy


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

    def most_entries(self, tokens: int) -> int:
        """The longest page list of any request of ``tokens`` tokens."""

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        """Pages that a step's prefill may need beside what requests hold.

        Args:
            max_tokens, max_requests: that one step may schedule.
        """

    def describe(self) -> str:
        """Say in one line what is kept."""

    def remarks(self) -> list[str]:
        """What else a user should know when the server starts."""


@dataclass(frozen=True)
class MixedRule:
    """Of a server whose requests may name policies of their own.

    Attributes:
        default: of requests that name none.
        step_tokens: tokens of one prompt that any step can read at once.
    """

    default: StreamRule | DenseRule
    step_tokens: int = 0
    mixed: ClassVar = True
    is_elastic: ClassVar = True
    has_bounded_lanes: ClassVar = True

    @property
    def policy(self) -> Policy:
        return self.default.policy

    @property
    def model(self) -> ModelShape:
        return self.default.model

    @property
    def page_size(self) -> int:
        return self.default.page_size

    @property
    def max_tokens(self) -> int:
        return self.default.max_tokens

    @property
    def copies(self) -> int:
        return self.default.copies

    @property
    def is_shared(self) -> bool:
        return self.default.is_shared

    @property
    def in_flight(self) -> int:
        return self.default.in_flight

    @property
    def observed(self) -> int:
        return self.default.observed

    @property
    def ranks(self) -> int:
        """Ranks that share the heads of a layer."""
        return self.full.ranks

    @property
    def may_select(self) -> bool:
        return self.ranks == 1 and not self.is_shared

    @property
    def weighs(self) -> bool:
        return self.may_select

    @property
    def full(self) -> PagePlan:
        return self.default.full

    @property
    def largest(self) -> PagePlan:
        stride = self.default.largest.stride
        return dataclasses.replace(self.full, stride=stride, is_shared=self.is_shared)

    def under(self, policy: Policy) -> StreamRule | DenseRule:
        """Return the rule of requests that name ``policy``.

        Raises:
            UserError: what they keep cannot lie beside what others keep.
        """
        if policy.capabilities.prefill == "dense":
            self._check_selecting(policy)
        if isinstance(policy, ThinningPolicy):
            raise UserError(
                f"{policy.name}: packs what it keeps, which cannot lie beside what "
                "other policies keep yet; start a server with it, or name another"
            )
        shape = self.model, self.page_size, self.max_tokens
        stride = self.largest.stride
        if isinstance(policy, DensePolicy):
            return DenseRule(policy, *shape, stride=stride)
        assert isinstance(policy, StreamingPolicy)
        steps = self.in_flight, self.is_shared
        return StreamRule(policy, *shape, self.ranks, stride, *steps)

    def _check_selecting(self, policy: Policy) -> None:
        """Refuse a policy that selects by content where it cannot."""
        assert isinstance(policy, DensePolicy)
        if self.is_shared:
            raise UserError(
                f"{policy.name}: keeps of a prefix what the text behind it attends to, "
                "but requests of this server share pages (--enable-prefix-caching); "
                "name a policy of positions"
            )
        if self.ranks > 1:
            raise UserError(
                f"{policy.name}: cannot be named where {self.ranks} ranks share the "
                "heads of a layer; name a policy of positions"
            )
        if policy.observation_window > self.step_tokens:
            raise UserError(
                f"{policy.name}: looks at the last {policy.observation_window} tokens "
                f"of a prompt in one step, but steps of this server have room for "
                f"{self.step_tokens}; ask for a shorter window, or another server"
            )

    def plan(self, tokens: int) -> PagePlan | DensePlan:
        return self.default.plan(tokens)

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> RequestPlan:
        return self.default.of_request(prompt_tokens, reply_tokens)

    def pages(self, tokens: int) -> int:
        return self.default.pages(tokens)

    def most_pages(self, tokens: int) -> int:
        return self.default.most_pages(tokens)

    def most_entries(self, tokens: int) -> int:
        """A request may name ``full``, or lanes that open pages at different times."""
        apart = self.full.num_lanes if self.may_select else 0
        return self.largest.entries(tokens) + apart

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        return scratch_pages(self.largest, max_tokens, max_requests, bounded=True)

    def describe(self) -> str:
        return self.default.describe()

    def remarks(self) -> list[str]:
        own = "a request may name a policy of its own (kv_policy)"
        return [*self.default.remarks(), own]


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
) -> Rule:
    """Return what makes the plan of each request under ``policy``.

    Args:
        model: the whole model, whatever ranks share it.
        in_flight: the most tokens under way at a time.
        shared: whether requests share pages, under policies that can.
        mixed: whether a request may name another policy.
        step_tokens: tokens of one prompt that any step can read at once.

    Raises:
        UserError: the policy cannot serve the model, or not on so many ranks.
    """
    if ranks > 1:
        check_ranks(policy, model, ranks)
    if model.layer_heads:
        check_unequal(policy, model, ranks, shared, mixed)
    if mixed and isinstance(policy, ThinningPolicy):
        raise UserError(
            f"--allow-request-policies: policy {policy.name} packs what it keeps, "
            "beside which requests of other policies cannot lie yet; leave it out"
        )
    rule: StreamRule | DenseRule
    if isinstance(policy, DensePolicy):
        if mixed and ranks > 1:
            raise no_mixing(policy, ranks)
        # Every rank selects among its own heads, and all have lanes of equal length.
        share = dataclasses.replace(
            model,
            num_query_heads=model.num_query_heads // ranks,
            num_kv_heads=model.num_kv_heads // ranks,
        )
        rule = DenseRule(policy, share, page_size, max_tokens, ranks)
    elif isinstance(policy, StreamingPolicy):
        rule = StreamRule(
            policy,
            model,
            page_size,
            max_tokens,
            ranks,
            in_flight=in_flight,
            is_shared=shared and policy.capabilities.prefix_cacheable,
        )
    else:
        raise UserError(
            f"--policy {policy.name}: is neither a StreamingPolicy nor a DensePolicy"
        )
    rule.plan(max_tokens)  # refuses a model that the policy cannot serve
    return MixedRule(rule, step_tokens) if mixed else rule
