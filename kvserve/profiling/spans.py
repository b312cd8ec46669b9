# SPDX-License-Identifier: Apache-2.0
"""A model whose KV heads have spans, each its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvserve.profiling.attention_hook import PromptAttention

PAGE = 32
SINKS = 64
_ROWS = 512


class SpanAttention(PromptAttention):
    """Causal attention in which each KV head sees 64 sinks and its window.

    Windows are counted in pages of 32 tokens, as the engine does at its default page
    size. ``spans`` has shape ``[R][H_kv]``, in tokens, sinks included; ``None`` is the
    dense model.
    """

    name = "kvserve_spans"

    def __init__(self) -> None:
        self.spans: list[list[int]] | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        num_kv_heads, tokens = key.shape[1:3]
        spans = self.spans[layer] if self.spans else [tokens] * num_kv_heads
        group = query.shape[1] // num_kv_heads
        outputs = [
            _attend(
                query[:, head * group : (head + 1) * group],
                key[:, head : head + 1],
                value[:, head : head + 1],
                spans[head],
                scale,
            )
            for head in range(num_kv_heads)
        ]
        return torch.cat(outputs, dim=1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, span: int, scale: float
) -> Tensor:
    """Attend with the query heads of one KV head, a tile of rows at a time."""
    tokens = key.shape[2]
    key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    attend = functional.scaled_dot_product_attention
    if span >= tokens:
        return attend(query, key, value, is_causal=True, scale=scale)
    tiles = []
    for first in range(0, tokens, _ROWS):
        rows = torch.arange(first, min(first + _ROWS, tokens), device=key.device)
        keys = torch.arange(int(rows[-1]) + 1, device=key.device)
        keys = keys[(keys < SINKS) | (keys >= _window_start(rows[:1], span))]
        seen = (keys < SINKS) | (keys >= _window_start(rows, span)[:, None])
        tiles.append(
            attend(
                query[:, :, rows],
                key[:, :, keys],
                value[:, :, keys],
                attn_mask=seen & (keys <= rows[:, None]),
                scale=scale,
            )
        )
    return torch.cat(tiles, dim=2)


def _window_start(rows: Tensor, span: int) -> Tensor:
    """First position in the window of each row; its own page is part of the window."""
    return (rows // PAGE - (span - SINKS) // PAGE + 1) * PAGE
