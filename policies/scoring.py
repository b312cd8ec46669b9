# SPDX-License-Identifier: Apache-2.0
"""Scores of cached tokens, as several papers build them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvserve.errors import UserError
from policies.base import Prompt


def observed_attention(prompt: Prompt, reduction: str = "mean") -> Tensor:
    """Attention of the prompt's last queries, ``[H_kv, L, N]``.

    The softmax covers all keys that a query sees, the window's own included: rows sum
    to 1, or to less where the model has a sink.

    Args:
        reduction: how query heads of a group become one: ``mean``, ``sum`` or ``max``.
    """
    kv_heads, tokens, width = prompt.keys.shape
    window = prompt.queries.shape[1]
    # A group's heads are rows of one product, so that its keys are read once.
    queries = (prompt.queries * prompt.scale).reshape(kv_heads, -1, width)
    logits = (queries @ prompt.keys.transpose(1, 2)).view(kv_heads, -1, window, tokens)
    # Only the window's own keys can lie in a query's future.
    future = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu(1)
    if prompt.weigh is not None:
        probabilities = prompt.weigh(logits, future)
    else:
        logits[..., tokens - window :].masked_fill_(future, float("-inf"))
        probabilities = logits.softmax(dim=-1)
    if reduction == "max":
        return probabilities.amax(dim=1)
    return probabilities.sum(dim=1) if reduction == "sum" else probabilities.mean(dim=1)


def pooled(scores: Tensor, kernel: int, kind: str = "avg") -> Tensor:
    """Smooth ``[heads, n]`` along tokens, stride 1, zeros (``avg``) beyond the ends."""
    pool = max_pool1d if kind == "max" else avg_pool1d
    return pool(scores[None], kernel, stride=1, padding=kernel // 2)[0]


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest of ``scores [n]``, ascending.

    Of equal scores the later position wins, on every device.
    """
    order = scores.flip(0).argsort(descending=True, stable=True)[:count]
    return (len(scores) - 1 - order).sort().values


def choice(policy: str, name: str, value: str, *allowed: str) -> None:
    """Check a parameter that names one of a few ways.

    Raises:
        UserError: ``value`` is none of ``allowed``.
    """
    if value not in allowed:
        raise UserError(
            f"--policy-arg {name}={value}: must be one of {', '.join(allowed)} "
            f"(policy {policy})"
        )


def odd(policy: str, name: str, value: int) -> None:
    """Check the width of a pooling window.

    Raises:
        UserError: ``value`` is even, which would shift the scores.
    """
    if value % 2 == 0:
        raise UserError(f"--policy-arg {name}={value}: must be odd (policy {policy})")
