# SPDX-License-Identifier: Apache-2.0
"""How a model scores keys, beyond a scale: what it was trained with and kernels obey.

With a query ``q``, keys ``k_j`` and a scale ``s``, query head ``h`` gives key ``j``

    logit_j = cap * tanh(s * q @ k_j / cap) + slope_h * (position_j - own position)
    weight_j = exp(logit_j) / (exp(sink_h) + sum of exp(logit_i) over seen keys i)

where what a form does not name is left out. This is what vLLM's kernels compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreForm:
    """What a layer does to its logits; by default nothing.

    Attributes:
        soft_cap: no logit is further from 0 than this; 0 means any.
        sink_logits: one more term of each query head's softmax, of no value,
            ``[H_q]`` float32.
        alibi_slopes: what each query head adds for a token's distance, ``[H_q]``
            float32. Kernels then want :class:`Positions`.
        window: last keys of a row that a query sees, its own included; 0: all of them.
            Rows must list keys as they stand, none left out behind the first.

    Raises:
        ValueError: a negative cap, or tensors of another type or of unlike lengths.
    """

    soft_cap: float = 0.0
    sink_logits: Tensor | None = None
    alibi_slopes: Tensor | None = None
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"a window of {self.window}")
        if not self.soft_cap >= 0:
            raise ValueError(f"a soft cap of {self.soft_cap}")
        by_head = self._by_head()
        for each in by_head:
            if each.dtype != torch.float32 or each.ndim != 1:
                raise ValueError("sink logits and slopes are [H_q] float32")
            if len(each) != len(by_head[0]) or not each.is_contiguous():
                raise ValueError("one sink logit and one slope for each query head")

    def __bool__(self) -> bool:
        return bool(self.soft_cap or self.window or self._by_head())

    def _by_head(self) -> list[Tensor]:
        both = self.sink_logits, self.alibi_slopes
        return [each for each in both if each is not None]

    def kv_heads(self, group: int) -> int:
        """KV heads that have ``group`` query heads each; 1 where it does not matter.

        Raises:
            ValueError: the query heads do not come out even.
        """
        for each in self._by_head():
            if len(each) % group or not len(each):
                raise ValueError(f"{len(each)} query heads in groups of {group}")
            return len(each) // group
        return 1


@dataclass(frozen=True)
class Positions:
    """Where tokens stand in their texts: a row lists what is kept, not what there was.

    Attributes:
        cached: of the token in each slot, ``[num_pages, page_size]`` int32; what no row
            reads may be anything.
        own: of each token that asks, ``[tokens]`` int32.
    """

    cached: Tensor
    own: Tensor


@dataclass(frozen=True)
class RowScores:
    """A form over rows that are in any order.

    Attributes:
        first: what each row's first query is of, ``token * H_kv + KV head``, ``[rows]``
            int32 or int64; its further queries are of the tokens behind.
        positions: of the tokens that ask and of the pool; slopes ask for them.
    """

    form: ScoreForm
    first: Tensor
    positions: Positions | None = None

    def kv_heads(self, group: int) -> Tensor:
        """The KV head of each row, of ``group`` query heads, ``[rows]``."""
        return self.first % self.form.kv_heads(group)

    def distance(
        self, row: int, group: int, queries: int, keys: int, pages: Tensor
    ) -> Tensor | None:
        """How far a row's ``keys`` stand from its ``queries``, if the form asks.

        Args:
            group: query heads of a KV head.
            pages: of the row, ``[W]``.

        Returns:
            ``[queries, keys]``, int32, not positive where a query sees a key.
        """
        positions = positions_for(self.form, self.positions)
        if positions is None:
            return None
        token = int(self.first[row]) // self.form.kv_heads(group)
        own = positions.own[token : token + queries]
        used = pages[: -(-keys // positions.cached.shape[1])].long()
        return positions.cached[used].flatten()[:keys] - own[:, None]


def positions_for(
    form: ScoreForm | None, positions: Positions | None
) -> Positions | None:
    """What of ``positions`` a form asks for.

    Raises:
        ValueError: it has slopes, and there are no positions.
    """
    if form is None or form.alibi_slopes is None:
        return None
    if positions is None:
        raise ValueError("kvserve's kernels take positions where a form has slopes")
    return positions


def bent(
    logits: Tensor, form: ScoreForm | None, kv_heads: Tensor, distance: Tensor | None
) -> Tensor:
    """What a form makes of scaled products, before masks.

    Args:
        logits: ``[n, G, m]``.
        kv_heads: the KV head of each, ``[n]``, or the one of all, ``[1]``.
        distance: of keys from queries, not positive, ``[n, m]``; slopes ask for it.
    """
    if form is None:
        return logits
    if form.soft_cap:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    if form.alibi_slopes is not None:
        assert distance is not None
        slopes = _of_heads(form.alibi_slopes, kv_heads, logits)
        logits = logits + slopes * distance[:, None].to(logits.dtype)
    return logits


def weights_of(logits: Tensor, form: ScoreForm | None, kv_heads: Tensor) -> Tensor:
    """Softmax over the keys, of which a sink takes its part; arguments as of ``bent``.

    A query that sees no key has weights that are no numbers, unless it has a sink.
    """
    if form is None or form.sink_logits is None:
        return logits.softmax(-1)
    sinks = _of_heads(form.sink_logits, kv_heads, logits)
    whole = torch.cat([logits, sinks.expand(*logits.shape[:2], 1)], dim=-1)
    return whole.softmax(-1)[..., :-1]


def window_weights(logits: Tensor, future: Tensor, form: ScoreForm) -> Tensor:
    """What the last queries of a text give its keys.

    Args:
        logits: scaled products of the last ``L`` of ``N`` tokens, ``[H_kv, G, L, N]``.
        future: which of the last keys lie in a query's future, bool ``[L, L]``.

    Returns:
        ``[H_kv, G, L, N]``; rows sum to 1, or to less where the form has sinks.
    """
    kv_heads, group, window, tokens = logits.shape
    place = torch.arange(tokens, device=logits.device)
    distance = (place - place[tokens - window :, None]).repeat(kv_heads, 1)
    heads = torch.arange(kv_heads, device=logits.device).repeat_interleave(window)
    rows = bent(logits.transpose(1, 2).flatten(0, 1), form, heads, distance)
    hidden = future.repeat(kv_heads, 1)[:, None]
    recent = rows[..., tokens - window :].masked_fill(hidden, float("-inf"))
    rows = torch.cat([rows[..., : tokens - window], recent], dim=-1)
    weights = weights_of(rows, form, heads)
    return weights.view(kv_heads, window, group, tokens).transpose(1, 2)


def _of_heads(vector: Tensor, kv_heads: Tensor, logits: Tensor) -> Tensor:
    """What ``vector [H_q]`` says of heads of ``logits [n, G, m]``, ``[n, G, 1]``."""
    by_group = vector.to(logits.dtype).view(-1, logits.shape[1])
    return by_group[kv_heads.long()][..., None]
