# SPDX-License-Identifier: Apache-2.0
"""Of a server whose requests have rules of their own, side by side in one pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvserve.errors import UserError
from kvserve.plan.blocks import NOT_THINNED, blocks_of
from kvserve.plan.dense import DensePlan, DenseRule
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.streaming import StreamRule, scratch_pages
from policies.base import DensePolicy, ModelShape, Policy, StreamingPolicy
from policies.thinning import ThinningPolicy

_NAMED = "a request may name a policy of its own (kv_policy)"


@dataclass(frozen=True)
class MixedRule:
    """What makes the rule of each request.

    Attributes:
        default: of requests that name no policy; of a range of budgets, the least.
        step_tokens: tokens of one prompt that any step can read at once.
        mixed: whether a request may name a policy of its own.
        levels: rules of a range of budgets, the largest first and ``default`` the last;
            when a request is let in, the scheduler says which is its own.
        protects: whether a request may have tokens protected.
    """

    default: StreamRule | DenseRule
    step_tokens: int = 0
    mixed: bool = True
    levels: tuple[StreamRule, ...] = ()
    protects: bool = False
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
        return self.mixed and self.ranks == 1 and not self.is_shared

    @property
    def weighs(self) -> bool:
        return self.may_select

    @property
    def full(self) -> PagePlan:
        return self.default.full

    @property
    def largest(self) -> PagePlan:
        """That of a full cache, to whose tables lanes of every kind belong."""
        stride = self.default.largest.stride
        plan = dataclasses.replace(self.full, stride=stride, is_shared=self.is_shared)
        group = max(one.largest.group for one in self._known)
        if not group:
            return plan
        nowhere = ((NOT_THINNED,) * plan.num_kv_heads,) * plan.num_layers
        return dataclasses.replace(plan, group=group, keep=nowhere)

    @property
    def _known(self) -> Sequence[StreamRule | DenseRule]:
        return self.levels or (self.default,)

    @property
    def _thins(self) -> bool:
        return isinstance(self.policy, ThinningPolicy)

    def under(self, policy: Policy) -> StreamRule | DenseRule:
        """Return the rule of requests that name ``policy``.

        Raises:
            UserError: what they keep cannot lie beside what others keep.
        """
        if policy.capabilities.prefill == "dense":
            self._check_selecting(policy)
        if isinstance(policy, ThinningPolicy) and type(policy) is not type(self.policy):
            raise UserError(
                f"{policy.name}: judges tokens as this server has not been started to; "
                "start one with it, or name another policy"
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

    def of_request(self, prompt_tokens: int, reply_tokens: int) -> PagePlan | DensePlan:
        return self.default.of_request(prompt_tokens, reply_tokens)

    def pages(self, tokens: int) -> int:
        return self.default.pages(tokens)

    def most_pages(self, tokens: int) -> int:
        return self.default.most_pages(tokens)

    def least_pool(self, tokens: int) -> int:
        """A request may name ``full``; what it has protected it must ask for."""
        least = self.default.least_pool(tokens)
        if not self.mixed:
            return least
        return max(least, self.full.most_pages(tokens, self.in_flight))

    def most_entries(self, tokens: int) -> int:
        """A request may name ``full``, or lanes that open pages at different times.

        Groups that leave open a page more than they have, at most, in each lane.
        """
        apart = self.full.num_lanes if self.may_select else 0
        everything = self.full.entries(tokens)
        packed = 2 * everything if self._thins else 0
        return everything + packed + apart

    def history_pages(self, tokens: int) -> int:
        """As many as there are blocks, if requests name policies that thin."""
        if self.mixed and self._thins:
            return blocks_of(tokens, self.page_size)
        return max(one.history_pages(tokens) for one in self._known)

    def scratch_pages(self, max_tokens: int, max_requests: int) -> int:
        if not self.mixed:
            steps = max_tokens, max_requests
            return max(one.scratch_pages(*steps) for one in self._known)
        recycling = dataclasses.replace(self.largest, group=0, keep=())
        return scratch_pages(recycling, max_tokens, max_requests, bounded=True)

    def describe(self) -> str:
        return self.default.describe()

    def remarks(self) -> list[str]:
        return [
            *self.default.remarks(),
            *([_NAMED] if self.mixed else []),
            *([self._range()] if self.levels else []),
        ]

    def _range(self) -> str:
        """Say between which shares of a full cache the budget of a request lies."""
        tokens = self.max_tokens
        full = self.full.pages(tokens)
        shares = [f"{one.pages(tokens) / full:.1%}" for one in self.levels]
        return (
            f"a request gets the largest budget with which all that wait fit, of "
            f"{', '.join(shares)} of the full cache at {tokens} tokens"
        )
