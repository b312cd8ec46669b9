# SPDX-License-Identifier: Apache-2.0
"""Forms of scores to try, and what they say in float64, key by key."""

from __future__ import annotations

import torch
from torch import Tensor

from kvserve.kernels.score_form import ScoreForm

FORMS = ["sinks", "cap", "slopes", "sinks cap", "sinks slopes", "sinks cap slopes"]
"""What a form may ask for, alone and together."""
WINDOWS = ["window", "window sinks", "window sinks cap slopes"]
"""Forms of layers that no policy decides on, so nobody adds up their attention."""
WINDOW = 37
CAP = 3.0
LOUD = 4.0
"""Of queries, so that logits reach the cap."""
LAST = 70_000
"""Where a text ends that rows keep tokens of."""


def make_form(parts: str, heads: int, device: str = "cpu") -> ScoreForm:
    """A form of some parts, unlike for each of the query ``heads``."""
    spread = torch.arange(heads, device=device) / heads
    return ScoreForm(
        CAP if "cap" in parts else 0.0,
        3 - 7 * spread if "sinks" in parts else None,
        0.02 + 0.5 * spread.flip(0) if "slopes" in parts else None,
        WINDOW if "window" in parts else 0,
    )


def scattered_positions(
    table: Tensor, lengths: list[int], recent: int, num_pages: int, page_size: int
) -> tuple[Tensor, list[Tensor]]:
    """Let each row keep some tokens of a text that ends at ``LAST``, in any order.

    Args:
        recent: a row's last tokens, which follow one another.

    Returns:
        Positions of slots, ``[num_pages, page_size]``, rubbish where nobody reads; and
        those of each row's keys.
    """
    slots = torch.full((num_pages, page_size), 1 << 30, dtype=torch.int32)
    of_rows = []
    for row, length in enumerate(lengths):
        gaps = torch.where(torch.rand(length) < 0.1, 9, 1)
        gaps[:recent] = 1
        own = (LAST + 1 - gaps.cumsum(0)).flip(0).int()
        older = max(length - recent, 0)
        own[:older] = own[torch.randperm(older)]
        token = torch.arange(length)
        slots[table[row, token // page_size].long(), token % page_size] = own
        of_rows.append(own)
    return slots, of_rows


def weights(
    query: Tensor,
    keys: Tensor,
    scale: float,
    form: ScoreForm,
    head: int,
    distance: Tensor | None = None,
    gap: tuple[int, int] = (0, 0),
) -> Tensor:
    """What one query of one query ``head`` gives each key that it sees, ``[m]``.

    Args:
        query: ``[d]``; ``keys``: ``[m, d]``.
        distance: of the keys from the query, ``[m]``.
        gap: first and last of keys, the last exclusive, that it does not see.
    """
    logits = (keys.double() @ query.double()) * scale
    if form.soft_cap:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    if form.alibi_slopes is not None:
        assert distance is not None
        assert (distance <= 0).all()
        logits = logits + form.alibi_slopes[head].double() * distance.double()
    if form.window:
        logits[: max(len(keys) - form.window, 0)] = float("-inf")
    logits[slice(*gap)] = float("-inf")
    powers, below = logits.exp(), 0.0
    if form.sink_logits is not None:
        below = float(form.sink_logits[head].double().exp())
    whole = powers.sum() + below
    return powers / whole if whole else powers
