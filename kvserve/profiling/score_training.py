# SPDX-License-Identifier: Apache-2.0
"""Train for each layer a network that foretells scores (``policies/kvzap.py``).

The loss is that of KVzap (arXiv 2601.07891, section 3), the squared distance of log
scores, and one on what becomes of them: within a group, the cross-entropy between its
tokens' shares of the scores and of the guesses. What is compared are tokens of one
group, and of these the ones with the highest scores.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.kvzap import Network, foretell

LEAST = 1e-4
"""Scores below are as good as this: nobody looked."""
_BATCH = 8
_LEARNING_RATE = 2e-3
_WARM_UP = 20


def train_network(
    inputs: Tensor, scores: Tensor, width: int, epochs: int, seed: int
) -> Network:
    """Train one layer's network.

    Args:
        inputs: Of groups, ``[n, G, F]``, float32.
        scores: What repeating them looked at, ``[n, H_kv, G]``, float32.
        width: Hidden units.
        epochs: How often each group is seen.
        seed: Draws the first weights and the order.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = scores.clamp_min(LEAST).log()
    centre = targets.mean((0, 2), keepdim=True)
    spread = targets.std((0, 2), keepdim=True).clamp_min(1e-3)
    targets = (targets - centre) / spread
    shares = scores / scores.sum(-1, keepdim=True).clamp_min(LEAST)
    network = _fresh(inputs, scores.shape[1], width, generator)
    learned = [network[name].requires_grad_() for name in network if "." in name]
    optimizer = torch.optim.AdamW(learned, _LEARNING_RATE, weight_decay=1e-2)
    order = partial(torch.randperm, len(inputs), generator=generator)
    batches = [batch for _ in range(epochs) for batch in torch.split(order(), _BATCH)]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = _rate(step, len(batches))
        guesses = foretell(network, inputs[batch])
        loss = functional.mse_loss(guesses, targets[batch])
        loss = loss - (shares[batch] * guesses.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach() for name, tensor in network.items()}


def _fresh(
    inputs: Tensor, heads: int, width: int, generator: torch.Generator
) -> Network:
    size = inputs.shape[-1]

    def drawn(rows: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns)
        return nn.init.uniform_(
            torch.empty(rows, columns), -bound, bound, generator=generator
        )

    return {
        "mean": inputs.mean((0, 1)),
        "std": inputs.std((0, 1)).clamp_min(1e-3),
        "hidden.weight": drawn(width, size),
        "hidden.bias": torch.zeros(width),
        "out.weight": drawn(heads, width),
        "out.bias": torch.zeros(heads),
    }


def _rate(step: int, steps: int) -> float:
    """Warm up, then come to rest along half a cosine."""
    warm = min(1.0, (step + 1) / _WARM_UP)
    return _LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
