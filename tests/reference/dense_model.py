# SPDX-License-Identifier: Apache-2.0
"""A Llama in plain float32 PyTorch that evicts after a dense prefill.

Each layer attends for the prompt at once and for the reply token by token, every KV
head over the positions that its reference policy has left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policies.base import FULL
from tests.reference.dense_policies import Reference, of_group
from tests.reference.masked_model import MaskedLlama
from tests.reference.thinning import Judge


class DenseLlama(MaskedLlama):
    """Records what each head held when the last token was attended to."""

    def reply_logits(
        self, tokens: Sequence[int], prompt: int, policy: Reference
    ) -> tuple[Tensor, list[list[set[int]]]]:
        """Return logits from the prompt's last token on, and positions held.

        Args:
            tokens: prompt and reply.
            prompt: tokens of the prompt.

        Returns:
            ``[n - prompt + 1, V]`` and ``[layers][num_kv_heads]``, of layers without
            a window of their own.
        """
        held: list[list[set[int]]] = []
        layers: Any = [(policy, prompt, held)] * self.shape.num_layers
        return self.logits(tokens, layers, 0, prompt - 1), held

    def _attention(
        self,
        hidden: Tensor,
        name: str,
        budgets: Any,
        page_size: int,
        layer: int,
        judge: Judge | None = None,
    ) -> Tensor:
        if self.shape.local[layer] is not None:
            full = [FULL] * self.shape.num_kv_heads
            return super()._attention(hidden, name, full, page_size, layer, judge)
        policy, prompt, held = budgets
        shape, tokens = self.shape, len(hidden)
        query, key, value = (
            self._project(hidden, f"{name}.{which}_proj").view(
                tokens, -1, shape.head_size
            )
            for which in ("q", "k", "v")
        )
        query, key = self._rotate(query), self._cached(self._rotate(key))
        value = self._cached(value)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        whole = self._whole(name, query[:, :prompt], key[:, :prompt])
        output = torch.zeros(shape.num_query_heads, tokens, shape.head_size)
        group = shape.num_query_heads // shape.num_kv_heads
        prompt_values = value[:, :prompt].repeat_interleave(group, dim=0)
        output[:, :prompt] = whole @ prompt_values
        kept = policy.keep(len(held), whole, value[:, :prompt])
        lanes = []
        for head in range(shape.num_kv_heads):
            scores = policy.score(whole, head, shape.num_kv_heads)
            cache = {j: scores[j] for j in kept[head]}
            rows = of_group(output, head, shape.num_kv_heads)
            queries = of_group(query, head, shape.num_kv_heads)
            seen = set(cache)
            for own in range(prompt, tokens):
                cache.pop(policy.make_room(cache, prompt), None)
                cache[own] = 0.0
                seen = set(cache)
                places = sorted(cache)
                weights = self._of_token(name, head, queries, own, key, places)
                rows[:, own] = weights @ value[head, places]
                for j, mass in zip(places, weights.sum(dim=0).tolist(), strict=True):
                    cache[j] += mass
                victim = policy.evict(cache, prompt, own)
                if victim is not None:
                    del cache[victim]
            lanes.append(seen)
        held.append(lanes)
        merged = output.transpose(0, 1).reshape(tokens, -1)
        return self._project(merged, f"{name}.o_proj")

    def _whole(self, name: str, query: Tensor, key: Tensor) -> Tensor:
        """Causal attention of a prompt, ``[H_q, N, N]``."""
        places = torch.arange(query.shape[1])
        seen = places[None, :] <= places[:, None]
        group = len(query) // len(key)
        return torch.stack(
            [
                self._weigh(name, h, query[h], key[h // group], places, places, seen)
                for h in range(len(query))
            ]
        )

    def _of_token(
        self,
        name: str,
        kv_head: int,
        queries: Tensor,
        own: int,
        key: Tensor,
        places: list[int],
    ) -> Tensor:
        """Attention of token ``own`` to the keys at ``places``, ``[G, m]``.

        ``queries`` are those of the KV head, ``[G, N, D]``.
        """
        group, at = len(queries), torch.tensor(places)
        seen = torch.ones(1, len(places), dtype=torch.bool)
        rows = [
            self._weigh(
                name,
                kv_head * group + one,
                queries[one, own : own + 1],
                key[kv_head, places],
                torch.tensor([own]),
                at,
                seen,
            )
            for one in range(group)
        ]
        return torch.cat(rows)
