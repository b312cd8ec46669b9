# SPDX-License-Identifier: Apache-2.0
"""Budgets as they are typed: a share, tokens, or a range of either."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvserve.errors import UserError

_LONG = 1 << 40
"""Tokens of a request in which budgets in tokens are shares of different size."""


@dataclass(frozen=True)
class Budget:
    """A share of the KV entries of a request, or tokens of every head."""

    share: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``0.25``, ``25%`` or ``512``.

        Raises:
            UserError: it is none of these.
        """
        try:
            if text.endswith("%"):
                return cls._of_share(float(text[:-1]) / 100)
            value = float(text)
        except ValueError:
            raise _bad_budget(text) from None
        if value <= 1:
            return cls._of_share(value)
        if not math.isfinite(value) or value != int(value):
            raise _bad_budget(text)
        return cls(tokens=int(value))

    @classmethod
    def _of_share(cls, share: float) -> Budget:
        if not 0 < share <= 1:
            raise _bad_budget(str(share))
        return cls(share=share)

    def __str__(self) -> str:
        """As it is typed: ``25%`` or ``512``."""
        return str(self.tokens) if self.share is None else f"{100 * self.share:g}%"

    def share_of(self, length: int) -> float:
        """The budget as a share of a request of ``length`` tokens."""
        if self.share is not None:
            return self.share
        assert self.tokens is not None
        return min(self.tokens / length, 1.0)

    def scaled(self, part: float) -> Budget:
        """A part of the budget."""
        if self.share is not None:
            return Budget(share=round(self.share * part, 4))
        assert self.tokens is not None
        return Budget(tokens=round(self.tokens * part))


def parse_range(text: str) -> tuple[Budget, Budget | None]:
    """Read a budget, or a range ``50%..12.5%``: the largest and the least.

    Raises:
        UserError: it is neither.
    """
    ends = text.split("..")
    if len(ends) > 2 or not all(ends):
        raise _bad_budget(text)
    largest, *least = map(Budget.parse, ends)
    if not least:
        return largest, None
    if (largest.share is None) != (least[0].share is None):
        raise UserError(f"--policy: budget={text}: give two shares, or tokens twice")
    if not largest.share_of(_LONG) > least[0].share_of(_LONG):
        raise UserError(
            f"--policy: budget={text}: a range goes from the largest budget down to "
            "the least, such as 50%..12.5%"
        )
    return largest, least[0]


def _bad_budget(text: str) -> UserError:
    return UserError(
        f"--policy: budget={text}: give a share of the KV entries such as 0.25 or 25%, "
        "tokens such as 512, or for a server a range such as 50%..12.5%"
    )


def levels_between(largest: Budget, least: Budget) -> list[Budget]:
    """Budgets from the largest down to the least, both among them.

    Each is at most the square root of two times the next, but for rounding.
    """
    ratio = least.share_of(_LONG) / largest.share_of(_LONG)
    steps = max(math.ceil(-2 * math.log2(ratio) - 1e-9), 1)
    parts = [ratio ** (step / steps) for step in range(1, steps)]
    # Small ones may be equal once they are whole.
    return [*dict.fromkeys([largest, *map(largest.scaled, parts), least])]
