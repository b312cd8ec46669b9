# SPDX-License-Identifier: Apache-2.0
"""What hiding keys from a head would change, estimated from one backward pass.

Source: MoA (arXiv 2406.14909, section 4.2). With A an attention matrix and g = dL/dA,
hiding one key j from query i, the rest of the row renormalised, changes the loss by

    E_ij = A_ij / (1 - A_ij) * (sum_n g_in A_in - g_ij)

to first order. The authors add up ``|E_ij|`` over all that a window hides: here
``entries``. It has two flaws that a model of 135 million parameters shows well. Small
effects of either sign, on millions of pairs, outweigh the few pairs that matter. And
each key is hidden while the others stay, though a window hides them together.

``joint``, the default, is the same first-order change for all hidden keys at once,
with E as the case of one key:

    dL_i = (sum of g_ij A_ij over visible j) / (sum of A_ij over visible j)
           - sum_n g_in A_in

added up with its sign over queries and over the query heads of a KV head. L is minus
the log-probability of a reply sampled from the dense model's own distribution, whose
expected gradient is zero, so half the mean square of dL is the second-order estimate
of the KL divergence between the dense model and one whose head has the window.

Both are counted in blocks of 64 tokens. A window of ``w`` blocks shows a query in
block ``i`` the sink block 0 and blocks ``i - w + 1 .. i``, causally.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kvserve.profiling.answers import pass_back_from_reply
from kvserve.profiling.attention_hook import (
    PromptAttention,
    causal_attention,
    causal_weights,
    remember_one_layer,
)
from kvserve.profiling.recital import Recital

BLOCK = 64
_ROWS = 512

Measure = Literal["joint", "entries"]


def entry_influence(weights: Tensor, slopes: Tensor, offset: Tensor) -> Tensor:
    """Return E, the change of the loss when one key is hidden, ``[rows, keys]``.

    Args:
        weights: A, attention probabilities, ``[rows, keys]``.
        slopes: g = dL/dA, ``[rows, keys]``.
        offset: ``sum_n g_in A_in`` of each row, ``[rows]``.
    """
    eps = torch.finfo(weights.dtype).eps
    return weights / (1 - weights + eps) * (offset[:, None] - slopes)


def hidden_entries(weights: Tensor, slopes: Tensor, offset: Tensor) -> Tensor:
    """Add up ``|E|`` over key blocks ``1 .. b``, ``[rows, blocks]``."""
    influence = entry_influence(weights, slopes, offset).abs()
    blocks = _block_sums(influence)
    blocks[:, 0] = 0
    return blocks.cumsum(1)


def hidden_jointly(weights: Tensor, slopes: Tensor, offset: Tensor) -> Tensor:
    """Change of the loss when key blocks ``1 .. b`` are hidden, ``[rows, blocks]``."""
    mass = _visible_sums(_block_sums(weights))
    pull = _visible_sums(_block_sums(weights * slopes))
    tiny = torch.finfo(weights.dtype).tiny
    return pull / mass.clamp_min(tiny) - offset[:, None]


def _block_sums(entries: Tensor) -> Tensor:
    return entries.view(len(entries), -1, BLOCK).sum(2)


def _visible_sums(blocks: Tensor) -> Tensor:
    """Add up all blocks but ``1 .. b``, for each ``b``.

    What is visible is added, not what is hidden taken away: where nearly all of a
    row's attention is hidden, the difference would be rounding noise.
    """
    after = blocks.flip(1).cumsum(1).flip(1) - blocks
    after[:, -1] = 0
    return after + blocks[:, :1]


def add_diagonals(curve: Tensor, changes: Tensor, first_block: int) -> None:
    """Sort changes by the window that makes them.

    Query block ``i`` that does not see key blocks ``1 .. b`` has a window of
    ``i - b`` blocks.

    Args:
        curve: Change of the loss for each window, ``[blocks]``; added to.
        changes: ``[rows, blocks]`` of whole query blocks from ``first_block`` on.
    """
    for number, row in enumerate(changes.view(-1, BLOCK, changes.shape[1]).sum(1)):
        own = first_block + number
        curve[1:own] += row[1:own].flip(0)


class InfluenceProbe(PromptAttention):
    """Causal attention whose backward pass notes what windows would change.

    Prompts are a multiple of 64 tokens long.
    ``curves[layer]`` has shape ``[H_kv, blocks]``: the first-order change of the loss
    for each window, its sign kept under ``joint``; zeros of a layer that has a window
    of its own. It is complete after the backward pass. Attention matrices are made one
    tile of one head at a time.
    """

    name = "kvserve_influence"

    def __init__(self, measure: Measure) -> None:
        self.curves: dict[int, Tensor] = {}
        self.changes = hidden_jointly if measure == "joint" else hidden_entries

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here, and remember one layer at most."""
        super().attach(model)
        remember_one_layer(model)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        output: Tensor = _ProbedAttention.apply(  # type: ignore[no-untyped-call]
            query[0], key[0], value[0], scale, self, layer
        )
        return output[None]

    def pass_over(self, layer: int, key: Tensor) -> None:
        self.curves[layer] = torch.zeros(key.shape[1], key.shape[2] // BLOCK)


class _ProbedAttention(torch.autograd.Function):
    """Attention with a backward pass that sees A and dL/dA, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        probe: InfluenceProbe,
        layer: int,
    ) -> Tensor:
        """Attend; shapes ``[H_q, n, d]`` and ``[H_kv, n, d]``."""
        output = causal_attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale, ctx.probe, ctx.layer = scale, probe, layer
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        (grad,) = grads
        offset = (grad * output).sum(-1)
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        group, blocks = len(query) // len(key), query.shape[1] // BLOCK
        curves = torch.zeros(len(key), blocks)
        for head in range(len(query)):
            kv_head = head // group
            for first in range(0, query.shape[1], _ROWS):
                rows = slice(first, first + _ROWS)
                keys, values = key[kv_head, : rows.stop], value[kv_head, : rows.stop]
                above = offset[head, rows]
                weights = causal_weights(query[head, rows] * ctx.scale, keys, first)
                slopes = grad[head, rows] @ values.T
                changes = ctx.probe.changes(weights, slopes, above)
                add_diagonals(curves[kv_head], changes.cpu(), first // BLOCK)
                grad_value[kv_head, : rows.stop] += weights.T @ grad[head, rows]
                grad_scores = weights * (slopes - above[:, None]) * ctx.scale
                grad_query[head, rows] = grad_scores @ keys
                grad_key[kv_head, : rows.stop] += grad_scores.T @ query[head, rows]
        ctx.probe.curves[ctx.layer] = curves
        return grad_query, grad_key, grad_value, None, None, None


def measure_influence(
    model: Any, probe: InfluenceProbe, recital: Recital, seed: int
) -> Tensor:
    """Return what each window of each KV head would cost, ``[R, H_kv, blocks]``.

    Per answer token: an estimate of the KL divergence in nats (``joint``), or the sum
    of ``|E|`` (``entries``).

    Args:
        probe: Attached to ``model``.
        recital: A prompt and its reply, a multiple of 64 tokens.
        seed: Draws the tokens that take the answers' places in the loss.
    """
    probe.curves.clear()
    pass_back_from_reply(model, recital, seed)
    curves = torch.stack([probe.curves[layer] for layer in sorted(probe.curves)])
    if probe.changes is hidden_jointly:
        curves = curves.square() / 2
    return curves / len(recital.answers)
