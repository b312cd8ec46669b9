# SPDX-License-Identifier: Apache-2.0
"""Every KV head has a span of its own, which grows with the length it is made for.

Source: MoA, Mixture of Attention Spans (arXiv 2406.14909, section 4). A span counts
64 sinks and a window, in prefill as in decode. The authors fix a request's spans by
its own length; here one length holds for all requests of a server, so that what a
request keeps does not depend on how long a reply it asked for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
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

_BLOCK = 64
_SINKS = 64
_LEAST = 128

Spans = list[list[int]]


@dataclass(frozen=True)
class MoA(StreamingPolicy):
    """Head h keeps sinks and a window, ``alpha + beta * length`` tokens together."""

    name: ClassVar[str] = "moa"
    paper: ClassVar[str] = "MoA, arXiv 2406.14909"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        needs_profile=True,
        cuda_graph_safe=True,
    )

    plan: str | None = parameter(
        None, "the authors' plan: JSON of alphas and betas, per query or per KV head"
    )
    length: int | None = parameter(
        None, "tokens that spans are made for; default: --max-model-len", minimum=128
    )

    def budgets(self, model: ModelShape) -> tuple[tuple[HeadBudget, ...], ...]:
        length = self.length or model.max_tokens
        layers = []
        for spans in self._spans(model):
            group = len(spans) // model.num_kv_heads
            largest = [
                max(spans[first : first + group])
                for first in range(0, len(spans), group)
            ]
            layers.append(tuple(_budget(tokens, length) for tokens in largest))
        return tuple(layers)

    def remark(self, model: ModelShape) -> str:
        """Show what sharing a cache costs a plan made per query head."""
        length, spans = self.length or model.max_tokens, self._spans(model)
        asked = sum(map(sum, spans)) / sum(map(len, spans)) / length
        kept = [
            length if head.recent is None else head.sinks + head.recent
            for layer in self.budgets(model)
            for head in layer
        ]
        got = sum(kept) / len(kept) / length
        return (
            f"at {length} tokens the plan asks for {asked:.1%} of the KV cache; heads "
            f"that share keys and values keep the largest span of theirs: {got:.1%}"
        )

    def _spans(self, model: ModelShape) -> Spans:
        if self.plan is None:
            raise UserError(
                "--policy moa: needs a plan; pass `--policy-arg plan=FILE` with the "
                "authors' JSON of alphas and betas for this model"
            )
        path = Path(self.plan).expanduser()
        rules = _read(path)
        widths = {len(layer) for layer in rules}
        if len(rules) != model.num_layers or not widths <= {
            model.num_query_heads,
            model.num_kv_heads,
        }:
            raise UserError(
                f"--policy-arg plan={path}: is of another model: {len(rules)} layers "
                f"x {'/'.join(map(str, sorted(widths))) or 'no'} heads, but "
                f"{model.name} has {model.num_layers} layers, "
                f"{model.num_query_heads} query heads and {model.num_kv_heads} KV heads"
            )
        length = self.length or model.max_tokens
        return [[span(a, b, length) for a, b in layer] for layer in rules]


def span(alpha: float, beta: float, length: int) -> int:
    """Tokens that a head keeps: at least 128, in blocks of 64, at most ``length``."""
    tokens = min(int(alpha + beta * length), length)
    return min(-(-max(tokens, _LEAST) // _BLOCK) * _BLOCK, length)


def _budget(tokens: int, length: int) -> HeadBudget:
    if tokens >= length:
        return FULL
    return HeadBudget(_SINKS, tokens - _SINKS)


def _read(path: Path) -> list[list[tuple[float, float]]]:
    """Read ``(alpha, beta)`` of every head, ``[num_layers][heads]``."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--policy-arg plan={path}: cannot be read ({error})") from None
    try:
        data = json.loads(text)
        return [
            [(_number(a), _number(b)) for a, b in zip(alphas, betas, strict=True)]
            for alphas, betas in zip(data["alphas"], data["betas"], strict=True)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--policy-arg plan={path}: malformed ({error}); expected JSON of alphas "
            "and betas, a list for each layer"
        ) from None


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number
