# SPDX-License-Identifier: Apache-2.0
"""What the routes need of vLLM: the served policy, its plans, calls to the engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.layers import model_shape_of
from kvserve.engine.start.preflight import page_bytes_of
from kvserve.engine.start.support import (
    budgets_of,
    fits,
    pages_hold,
    rule_of,
    scratch_of,
)
from kvserve.http.models import (
    Budgets,
    Level,
    PlanBody,
    PlanLevel,
    PolicyBody,
    Profile,
    Served,
)
from kvserve.plan.blocks import NOT_THINNED
from kvserve.plan.page_plan import PagePlan
from kvserve.plan.rule import Rule
from policies.base import Policy
from policies.files import read_bytes
from policies.registry import changed_arguments


class ServedPolicy:
    """The active policy and what it makes of requests."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self.rule = rule_of(config)
        self._policy: Policy = self.rule.policy
        self.page_bytes = page_bytes_of(config)
        self._levels = budgets_of(config)
        self.protect = PolicySettings.from_config(config).protect

    @property
    def name(self) -> str:
        return self._policy.name

    @property
    def max_tokens(self) -> int:
        return self._config.model_config.max_model_len

    @property
    def arguments(self) -> dict[str, Any]:
        return dataclasses.asdict(self._policy)

    @property
    def changed_arguments(self) -> str:
        """Arguments that are not the defaults, as ``key=value`` with commas."""
        return changed_arguments(self._policy)

    @property
    def budgets(self) -> list[str]:
        """Names of the budgets of a range, the largest first; none without a range."""
        return list(self._levels)

    def describe(self, context: int) -> PolicyBody:
        """Describe the policy, with budgets for requests of ``context`` tokens."""
        model = model_shape_of(self._config)
        return PolicyBody(
            policy=self.name,
            arguments=self.arguments,
            summary=self.rule.describe(),
            source=self._policy.paper,
            capabilities=dataclasses.asdict(self._policy.capabilities),
            model=Served(
                **{name: getattr(model, name) for name in Served.model_fields}
            ),
            page_tokens=self.rule.page_size,
            page_bytes=self.page_bytes,
            kv_cache_dtype=pages_hold(self._config),
            scratch_pages=scratch_of(self._config, self.rule),
            budgets=self._budgets(context),
            profiles=self._profiles,
            request_policies=self.rule.mixed,
            levels=[
                Level(
                    budget=name,
                    arguments=dataclasses.asdict(rule.policy),
                    kept=rule.pages(context) / self.rule.full.pages(context),
                )
                for name, rule in self._levels.items()
            ]
            or None,
            protect=self.protect or None,
        )

    def plan(self, context: int, pool: int) -> PlanBody:
        """Work out what a request of ``context`` tokens costs, at least.

        Args:
            pool: pages that requests can have.
        """
        rule, full = self.rule, self.rule.full.pages(context)
        # A cache that evicts nothing needs no scratch: its pages are requests', too.
        full_pool = pool + scratch_of(self._config, rule)
        return PlanBody(
            context=context,
            pages_full=full,
            bytes_full=full * self.page_bytes,
            pool_pages=pool,
            requests_fit_full=full_pool // full,
            **self._cost(rule, context, pool),
            levels=[
                PlanLevel(budget=name, **self._cost(level, context, pool))
                for name, level in self._levels.items()
            ]
            or None,
        )

    def _cost(self, rule: Rule, context: int, pool: int) -> dict[str, Any]:
        """Pages of a request under a rule, and how many such fit."""
        pages = rule.pages(context)
        return {
            "pages": pages,
            "pages_peak": max(rule.most_pages(context), pages),
            "bytes": pages * self.page_bytes,
            "kept": pages / rule.full.pages(context),
            "requests_fit": fits(rule, context, pool),
        }

    def _budgets(self, context: int) -> Budgets:
        rule = self.rule
        lanes = rule.plan(context).lane_tokens(context)
        retained = np.tile(lanes, rule.copies).tolist()
        bounds = rule.plan(context).bounds()
        if bounds is None:
            return Budgets(context=context, rows="lanes", retained=retained)
        sinks, windows = bounds
        return Budgets(
            context=context,
            rows="heads",
            retained=retained,
            sinks=sinks.tolist(),
            recent=[[window or None for window in layer] for layer in windows.tolist()],
            **history_of(rule.plan(context).reading),
        )

    @cached_property
    def _profiles(self) -> list[Profile]:
        name = model_shape_of(self._config).name
        return profiles_of(self._policy, name)


def history_of(plan: PagePlan) -> dict[str, Any]:
    """What heads keep of what leaves their windows, if some are thinned."""
    if not plan.group:
        return {}
    keep = [[None if k == NOT_THINNED else k for k in layer] for layer in plan.keep]
    return {"group": plan.group * plan.page_size, "keep": keep}


def profiles_of(policy: Policy, model_name: str) -> list[Profile]:
    """Say where the files come from that a policy reads."""
    named = policy.files(model_name)
    return [_profile(parameter, path) for parameter, path in named.items()]


def _profile(parameter: str, path: Path) -> Profile:
    content = read_bytes(path)
    return Profile(
        parameter=parameter,
        path=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
        facts=_facts(content),
    )


def _facts(content: bytes) -> dict[str, Any]:
    """Entries of a JSON file that are not lists of numbers."""
    try:
        data = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(data, dict) or "format" not in data:
        return {}
    return {key: value for key, value in data.items() if not isinstance(value, list)}
