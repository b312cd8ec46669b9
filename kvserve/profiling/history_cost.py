# SPDX-License-Identifier: Apache-2.0
"""What it costs a head to keep so many tokens of each group, from a backward pass.

The measure is ``joint`` of ``influence.py`` (after MoA, arXiv 2406.14909, section 4.2):
the first-order change of an answer's loss when a head alone sees sinks, window and the
``k`` tokens of each group that a scorer ranks highest, half its mean square the
estimate of the KL divergence. Attention paid to a token says how much a head looks at
it; this says what the answer makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvserve.profiling.answers import pass_back_from_reply
from kvserve.profiling.attention_hook import (
    PlainAttention,
    causal_attention,
    causal_weights,
    remember_one_layer,
)
from kvserve.profiling.recital import Recital
from policies.thinning import Groups

SINKS, GROUP, PAGE, WINDOW_PAGES = 32, 128, 32, 4
LADDER = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, GROUP)
"""Tokens of each group that a head may keep."""
_ROWS = 512

Rank = Callable[[int, Groups], Tensor]
"""Scores of a layer's groups, as :meth:`policies.thinning.ThinningPolicy.scores`."""


def first_raw(queries: Tensor) -> Tensor:
    """Where what queries at these positions see whole begins behind the sinks."""
    window = (queries // PAGE - (WINDOW_PAGES - 1)) * PAGE
    return SINKS + (window - SINKS).clamp_min(0) // GROUP * GROUP


class HistoryProbe(PlainAttention):
    """Causal attention whose backward pass notes what thinning would change.

    ``changes[layer]`` is the first-order change of the loss for each number of
    :data:`LADDER`, ``[H_kv, rungs]``; complete after the backward pass.
    """

    name = "kvserve_history"

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self.rank = rank
        self.changes: dict[int, Tensor] = {}

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here, and remember one layer at most."""
        super().attach(model)
        remember_one_layer(model)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        self.plain("q", layer, query)
        plain = self.plain("k", layer, key)
        rungs = self._rungs(layer, plain, value[0].detach())
        output: Tensor = _ProbedAttention.apply(  # type: ignore[no-untyped-call]
            query[0], key[0], value[0], scale, self, layer, rungs
        )
        return output[None]

    def _rungs(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """From which rung on a token is kept, one-hot ``[H_kv, n, rungs]``.

        Of sinks and tokens that belong to no whole group nothing is set.
        """
        heads, tokens, _ = keys.shape
        count = (tokens - SINKS) // GROUP
        rows = slice(SINKS, SINKS + count * GROUP)
        keys, values = (
            torch.stack(torch.split(part[:, rows], GROUP, 1)) for part in (keys, values)
        )
        positions = torch.arange(rows.start, rows.stop).view(count, GROUP)
        scores = self.rank(layer, Groups(keys, values, positions.to(keys.device)))
        places = scores.argsort(-1, descending=True).argsort(-1)
        ladder = torch.tensor(LADDER, device=keys.device)
        places = places.transpose(0, 1).flatten(1).contiguous()
        rungs = torch.bucketize(places, ladder, right=True)
        found = torch.zeros(heads, tokens, len(LADDER), device=keys.device)
        found[:, rows] = functional.one_hot(rungs, len(LADDER)).float()
        return found


class _ProbedAttention(torch.autograd.Function):
    """Attention with a backward pass that sees A and dL/dA, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        probe: HistoryProbe,
        layer: int,
        rungs: Tensor,
    ) -> Tensor:
        """Attend; shapes ``[H_q, n, d]`` and ``[H_kv, n, d]``."""
        output = causal_attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output, rungs)
        ctx.scale, ctx.probe, ctx.layer = scale, probe, layer
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, rungs = ctx.saved_tensors
        (grad,) = grads
        offset = (grad * output).sum(-1)
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        group, tokens = len(query) // len(key), query.shape[1]
        changes = torch.zeros(len(key), len(LADDER), device=query.device)
        for head in range(len(query)):
            kv_head = head // group
            for first in range(0, tokens, _ROWS):
                rows = slice(first, min(first + _ROWS, tokens))
                seen = slice(0, rows.stop)
                keys, values = key[kv_head, seen], value[kv_head, seen]
                above = offset[head, rows]
                weights = causal_weights(query[head, rows] * ctx.scale, keys, first)
                slopes = grad[head, rows] @ values.T
                kept = rungs[kv_head, seen]
                changes[kv_head] += thinned(weights, slopes, above, kept, first).sum(0)
                grad_value[kv_head, seen] += weights.T @ grad[head, rows]
                grad_scores = weights * (slopes - above[:, None]) * ctx.scale
                grad_query[head, rows] = grad_scores @ keys
                grad_key[kv_head, seen] += grad_scores.T @ query[head, rows]
        ctx.probe.changes[ctx.layer] = changes.cpu()
        return grad_query, grad_key, grad_value, None, None, None, None


def thinned(
    weights: Tensor, slopes: Tensor, offset: Tensor, rungs: Tensor, first: int
) -> Tensor:
    """Change of the loss for each rung of the ladder, ``[rows, rungs]``.

    Args:
        weights: A, attention probabilities, ``[rows, keys]``.
        slopes: g = dL/dA, ``[rows, keys]``.
        offset: ``sum_n g_in A_in`` of each row, ``[rows]``.
        rungs: From which rung on a key is kept, one-hot ``[keys, rungs]``.
        first: Position of the first row.
    """
    queries = torch.arange(first, first + len(weights), device=weights.device)
    keys = torch.arange(weights.shape[1], device=weights.device)
    thin = (keys >= SINKS) & (keys < first_raw(queries)[:, None])
    pulls = weights * slopes

    def visible(entries: Tensor) -> Tensor:
        history = ((entries * thin) @ rungs).cumsum(1)
        return (entries * ~thin).sum(1, keepdim=True) + history

    tiny = torch.finfo(weights.dtype).tiny
    return visible(pulls) / visible(weights).clamp_min(tiny) - offset[:, None]


def measure_history(
    model: Any, probe: HistoryProbe, recital: Recital, seed: int
) -> Tensor:
    """Return what each rung would cost each KV head, ``[R, H_kv, rungs]``.

    In nats an answer token: an estimate of the KL divergence.

    Args:
        probe: Attached to ``model``.
        recital: A prompt and its reply.
        seed: Draws the tokens that take the answers' places in the loss.
    """
    probe.changes.clear()
    pass_back_from_reply(model, recital, seed)
    changes = torch.stack([probe.changes[layer] for layer in sorted(probe.changes)])
    return changes.square() / 2 / len(recital.answers)
