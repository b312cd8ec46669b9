# SPDX-License-Identifier: Apache-2.0
"""What dense policies keep, written from the papers with loops and whole matrices.

Every function works on one layer: attention ``[H_q, N, N]`` of the whole prompt, keys
and values ``[H_kv, N, d]``, and gives the kept positions of every KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


def best(scores: dict[int, float], count: int) -> set[int]:
    """Highest scores; of equal ones the later position."""
    ranked = sorted(scores, key=lambda position: (-scores[position], -position))
    return set(ranked[:count])


def of_group(attention: Tensor, head: int, num_kv_heads: int) -> Tensor:
    group = len(attention) // num_kv_heads
    return attention[head * group : (head + 1) * group]


def average_pool(values: list[float], kernel: int) -> list[float]:
    """Mean over ``kernel`` neighbours, zeros beyond the ends."""
    half = kernel // 2
    return [
        sum(values[max(0, i - half) : i + half + 1]) / kernel
        for i in range(len(values))
    ]


class Reference:
    """Keeps every token; subclasses drop some."""

    def keep(self, layer: int, attention: Tensor, values: Tensor) -> list[set[int]]:
        """Positions of the prompt that each KV head keeps."""
        raise NotImplementedError

    def score(self, attention: Tensor, head: int, heads: int) -> dict[int, float]:
        """Attention mass of every prompt token of one KV head."""
        sums = of_group(attention, head, heads).double().sum(dim=(0, 1))
        return dict(enumerate(sums.tolist()))

    def evict(self, cache: dict[int, float], prompt: int, own: int) -> int | None:
        """Who goes once token ``own`` was attended to; ``None``: nobody."""
        return None

    def make_room(self, cache: dict[int, float], prompt: int) -> int | None:
        """Who goes before the next token comes; ``None``: nobody."""
        return None


@dataclass
class SnapKVReference(Reference):
    capacity: int
    window: int
    kernel: int = 5
    ring: int = 0

    def keep(self, layer: int, attention: Tensor, values: Tensor) -> list[set[int]]:
        heads, tokens = len(values), attention.shape[1]
        if tokens <= self.capacity:
            return [set(range(tokens)) for _ in range(heads)]
        kept, last = [], max(self.window, self.ring)
        for head in range(heads):
            rows = of_group(attention, head, heads)[:, tokens - self.window :]
            scores = rows.double().mean(dim=0).sum(dim=0).tolist()
            scores = average_pool(scores[: tokens - self.window], self.kernel)
            before = dict(enumerate(scores[: tokens - last]))
            heavy = best(before, self.capacity - last)
            kept.append(heavy | set(range(tokens - last, tokens)))
        return kept

    def make_room(self, cache: dict[int, float], prompt: int) -> int | None:
        if not self.ring or len(cache) < self.capacity:
            return None
        return sorted(cache)[-self.ring]


@dataclass
class H2OReference(Reference):
    """``shares`` of the prompt make both halves, and a reply may fill ``reply``."""

    heavy: int = 32
    recent: int = 32
    count: bool = False
    decode: bool = True
    shares: tuple[float, float] | None = None
    reply: int = 0

    def halves(self, tokens: int) -> tuple[int, int]:
        if self.shares is None:
            return self.heavy, self.recent
        heavy, recent = (int(share * tokens) for share in self.shares)
        return max(heavy, self.heavy), max(recent, self.recent)

    def keep(self, layer: int, attention: Tensor, values: Tensor) -> list[set[int]]:
        heads, tokens = len(values), attention.shape[1]
        heavy, recent = self.halves(tokens)
        if tokens <= heavy + recent:
            return [set(range(tokens)) for _ in range(heads)]
        kept = []
        for head in range(heads):
            sums = self.score(attention, head, heads)
            old = {
                j: sums[j] / (tokens - j) if self.count else sums[j]
                for j in range(tokens - recent)
            }
            last = set(range(tokens - recent, tokens))
            kept.append(best(old, heavy) | last)
        return kept

    def evict(self, cache: dict[int, float], prompt: int, own: int) -> int | None:
        heavy, recent = self.halves(prompt)
        limit = max(heavy + recent, self.reply)
        if not self.decode or len(cache) <= limit:
            return None
        safe = recent * limit // (heavy + recent)
        old = [j for j in cache if j <= own - safe]
        seen_by = {j: own + 1 - j if self.count else 1 for j in old}
        return min(old, key=lambda j: (cache[j] / seen_by[j], j))


@dataclass
class TaskKVReference(Reference):
    """policies.md 1.3, step by step."""

    num_layers: int
    budget: str
    beta: str
    m: int
    sinks: int
    recent: int
    top: int = 256
    window: int = 32
    kernel: int = 7
    bounded_tail: bool = False

    def keep(self, layer: int, attention: Tensor, values: Tensor) -> list[set[int]]:
        heads, tokens = len(values), attention.shape[1]
        means, vectors = [], []
        for head in range(heads):
            rows = of_group(attention, head, heads)[:, tokens - self.window :]
            mean = rows.mean(dim=(0, 1))
            means.append(mean.tolist())
            chosen = sorted(best(dict(enumerate(mean.tolist())), self.top))
            vectors.append(sum(mean[j] * values[head, j] for j in chosen))
        centre = sum(vectors) / heads
        distance = [math.dist(v.tolist(), centre.tolist()) for v in vectors]
        far, with_centre, each = self._sizes(layer, heads, tokens)
        ranked = sorted(range(heads), key=lambda c: (-distance[c], c))
        full = set(ranked[:far])
        if with_centre:
            full.add(min(ranked[far:], key=lambda c: (distance[c], c)))
        kept = []
        for head in range(heads):
            if head in full:
                kept.append(set(range(tokens)))
                continue
            pooled = average_pool(means[head], self.kernel)
            middle = {j: pooled[j] for j in range(self.sinks, tokens - self.recent)}
            ends = {*range(self.sinks), *range(tokens - self.recent, tokens)}
            kept.append(best(middle, each - self.sinks - self.recent) | ends)
        return kept

    def _sizes(self, layer: int, heads: int, tokens: int) -> tuple[int, bool, int]:
        beta, entries = Fraction(self.beta), Fraction(self.budget) * heads * tokens
        slope = (heads * beta - self.m) * Fraction(layer, self.num_layers - 1)
        far = math.floor(heads * beta - slope)
        for number, centre in [(far, True), *((n, False) for n in range(far, -1, -1))]:
            full = number + centre
            if full < heads:
                each = math.floor((entries - tokens * full) / (heads - full))
                if each >= self.sinks + self.recent:
                    return number, centre, each
        raise ValueError("the reference does not do budgets below sinks and window")

    def make_room(self, cache: dict[int, float], prompt: int) -> int | None:
        # A full head has no gap among its prompt tokens.
        if not self.bounded_tail or all(j in cache for j in range(prompt)):
            return None
        return min(j for j in cache if j >= prompt - self.recent)


def softmax_rows(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole prompt, ``[H_q, N, N]``."""
    group = len(query) // len(key)
    logits = query @ key.repeat_interleave(group, dim=0).transpose(1, 2) * scale
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
