# SPDX-License-Identifier: Apache-2.0
"""Every KV head has a span of its own, which grows with the length of the request.

Source: MoA, Mixture of Attention Spans (arXiv 2406.14909, section 4). A span counts
64 sinks and a window, in prefill as in decode. As in the authors' code it is fixed
when a request comes, by the tokens of its prompt and of the longest reply it may get.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kvserve.errors import UserError
from policies.base import (
    FULL,
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)
from policies.files import read_measured, refuse_model, shipped_or

PLAN_FORMAT = "kvserve-moa/1"
_BLOCK = 64
_SINKS = 64
_LEAST = 128
_BUDGET = 0.5

Rules = tuple[tuple[tuple[float, float], ...], ...]
"""``(alpha, beta)`` of every head, ``[num_layers][heads]``."""
Plans = dict[float | None, Rules]


@dataclass(frozen=True)
class MoA(StreamingPolicy):
    """Head h keeps sinks and a window, ``alpha + beta * length`` tokens together."""

    name: ClassVar[str] = "moa"
    paper: ClassVar[str] = "MoA, arXiv 2406.14909"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        needs_profile=True,
        elastic=True,
        prefix_cacheable=True,
        cuda_graph_safe=True,
        tensor_parallel_exact=True,
    )

    plan: str | None = parameter(
        None,
        "kvserve's plans, or a plan of the authors: JSON of alphas and betas, per "
        "query or per KV head; without it, the plans that ship for the model",
    )
    budget: float | None = parameter(
        None,
        "share of the KV cache, to choose among kvserve's plans; default: 0.5",
        minimum=0.0,
        maximum=1.0,
    )
    length: int | None = parameter(
        None,
        "tokens that spans are made for; default: each request's prompt and "
        "longest reply",
        minimum=128,
    )

    def files(self, model_name: str) -> dict[str, Path]:
        return {"plan": self._path(model_name)}

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        length = self.length or tokens
        if length > model.max_tokens:
            raise UserError(
                f"--policy-arg length={length}: {model.name} is served up to "
                f"{model.max_tokens} tokens, prompt and reply; give no more"
            )
        layers = []
        for rules in self._rules(model):
            spans = [span(alpha, beta, length) for alpha, beta in rules]
            group = len(spans) // model.num_kv_heads
            largest = [
                max(spans[first : first + group])
                for first in range(0, len(spans), group)
            ]
            layers.append(tuple(_head_budget(tokens, length) for tokens in largest))
        return tuple(layers)

    def remark(self, model: ModelShape) -> str:
        """Show what sharing a cache costs a plan made per query head."""
        length = self.length or model.max_tokens
        asked = [
            span(alpha, beta, length)
            for rules in self._rules(model)
            for alpha, beta in rules
        ]
        kept = [
            length if head.recent is None else head.sinks + head.recent
            for layer in self.budgets(model, model.max_tokens)
            for head in layer
        ]
        share, got = (sum(spans) / len(spans) / length for spans in (asked, kept))
        if len(asked) == len(kept):
            return f"{got:.1%} of the KV cache of {length} tokens"
        return (
            f"at {length} tokens the plan asks for {share:.1%} of the KV cache; heads "
            f"that share keys and values keep the largest span of theirs: {got:.1%}"
        )

    def _rules(self, model: ModelShape) -> Rules:
        path = self._path(model.name)
        rules = tuple(model.own(self._choose(_read(path), path)))
        widths = {len(layer) for layer in rules}
        if len(rules) != model.num_layers or not (
            widths == {model.num_query_heads} or widths == {model.num_kv_heads}
        ):
            heads = "/".join(map(str, sorted(widths))) or "no"
            refuse_model("plan", path, f"{len(rules)} layers x {heads} heads", model)
        return rules

    def _path(self, model_name: str) -> Path:
        path = shipped_or(self.plan, model_name, "moa.json")
        if self.plan is None and not path.exists():
            raise UserError(
                f"--policy moa: no plan ships for {model_name}; pass "
                "`--policy-arg plan=FILE` with JSON of alphas and betas"
            )
        return path

    def _choose(self, plans: Plans, path: Path) -> Rules:
        if None in plans:
            if self.budget is not None:
                raise UserError(
                    f"--policy-arg budget={self.budget}: {path} is a single plan; "
                    "leave it out"
                )
            return plans[None]
        budget = _BUDGET if self.budget is None else self.budget
        if budget not in plans:
            known = ", ".join(str(known) for known in sorted(filter(None, plans)))
            raise UserError(
                f"--policy-arg budget={budget}: {path} has plans for {known}; choose "
                "one of these"
            )
        return plans[budget]


def span(alpha: float, beta: float, length: int) -> int:
    """Tokens that a head keeps: at least 128, in blocks of 64, at most ``length``."""
    tokens = min(int(alpha + beta * length), length)
    return min(-(-max(tokens, _LEAST) // _BLOCK) * _BLOCK, length)


def _head_budget(tokens: int, length: int) -> HeadBudget:
    if tokens >= length:
        return FULL
    return HeadBudget(_SINKS, tokens - _SINKS)


def _read(path: Path) -> Plans:
    plans = "kvserve's plans, or JSON of alphas and betas, a list for each layer"
    return read_measured("plan", path, _parse, plans)


@lru_cache(maxsize=8)
def _parse(text: str) -> Plans:
    """Plans by their budgets; the authors' files have one, of no budget."""
    data = json.loads(text)
    if "format" not in data:
        return {None: _rules_of(data)}
    if data["format"] != PLAN_FORMAT:
        raise ValueError(f"format {data['format']!r}, expected {PLAN_FORMAT!r}")
    return {_number(plan["budget"]): _rules_of(plan) for plan in data["plans"]}


def _rules_of(plan: dict[str, Any]) -> Rules:
    return tuple(
        tuple((_number(a), _number(b)) for a, b in zip(alphas, betas, strict=True))
        for alphas, betas in zip(plan["alphas"], plan["betas"], strict=True)
    )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number
