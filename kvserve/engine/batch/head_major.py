# SPDX-License-Identifier: Apache-2.0
"""Queries in the order in which a kernel that knows one KV head takes rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadMajor:
    """Decode rows follow the tokens; behind them all tokens of one KV head, and so on.

    Attributes:
        decodes: leading rows that follow the tokens.
        group: query heads of a KV head.
    """

    decodes: int
    group: int

    def rows_of(self, query: Tensor) -> Tensor:
        """Lay out ``query [tokens, H_q, D]`` as ``[tokens * H_kv, G, D]``.

        What comes is contiguous: with one KV head, queries themselves need not be.
        """
        by_head = self._by_head(query)
        heads, width = by_head.shape[1], query.shape[2]
        tokens = self.decodes // heads
        if tokens == len(query):
            return query.reshape(-1, self.group, width).contiguous()
        rows = query.new_empty(len(query) * heads, self.group, width)
        rows[: self.decodes] = by_head[:tokens].flatten(0, 1)
        self._prefill(rows, heads).copy_(by_head[tokens:])
        return rows

    def put_back(self, rows: Tensor, out: Tensor) -> None:
        """Write ``rows [tokens * H_kv, G, D]`` to ``out [tokens, H_q, D]``."""
        by_head = self._by_head(out)
        heads = by_head.shape[1]
        tokens = self.decodes // heads
        by_head[:tokens] = rows[: self.decodes].view(by_head[:tokens].shape)
        by_head[tokens:] = self._prefill(rows, heads)

    def _by_head(self, tokens: Tensor) -> Tensor:
        """View ``[tokens, H_q, D]`` as ``[tokens, H_kv, G, D]``."""
        count, _, width = tokens.shape
        return tokens.view(count, -1, self.group, width)

    def _prefill(self, rows: Tensor, heads: int) -> Tensor:
        """View the rows behind the decodes by token, ``[tokens, H_kv, G, D]``."""
        behind = rows[self.decodes :]
        return behind.view(heads, -1, *rows.shape[1:]).transpose(0, 1)
