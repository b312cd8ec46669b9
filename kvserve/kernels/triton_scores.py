# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
"""What a ``ScoreForm`` makes of logits in the programs of ``triton_attention``.

Logits, sinks and slopes are in base 2 there. Without a form none of it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvserve.kernels.score_form import RowScores, positions_for

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class Scores:
    """A form as kernels read it.

    Attributes:
        arrays: sink logits, slopes, positions of slots, of tokens that ask, and each
            row's first query; where they are not wanted, anything.
        numbers: the cap in base 2, KV heads, and the window.
        constants: what kernels are compiled for.
    """

    arrays: tuple[Tensor, ...]
    numbers: tuple[float, int, int]
    constants: dict[str, bool]

    @classmethod
    def of(
        cls, scores: RowScores | None, group: int, slots: tuple[int, int], like: Tensor
    ) -> Scores:
        """Check that ``scores`` fit rows of ``group`` heads, and lay them out.

        Args:
            slots: pages, and slots of each.
            like: what stands for arrays that are not wanted.

        Raises:
            ValueError: they are of other heads, or slopes have no positions.
        """
        none = dict.fromkeys(("CAPPED", "SINKS", "SLOPES", "WINDOWED"), False)
        if scores is None or not scores.form:
            return cls((like,) * 5, (0.0, 1, 0), none)
        form, positions = scores.form, positions_for(scores.form, scores.positions)
        cached = own = like
        if positions is not None:
            cached, own = positions.cached, positions.own
            assert cached.is_contiguous()
            assert cached.shape == slots
            assert cached.dtype == own.dtype == torch.int32
        sinks, slopes = form.sink_logits, form.alibi_slopes
        given = {
            "CAPPED": form.soft_cap > 0,
            "SINKS": sinks is not None,
            "SLOPES": slopes is not None,
            "WINDOWED": form.window > 0,
        }
        by_head = tuple(like if each is None else each for each in (sinks, slopes))
        return cls(
            (*by_head, cached, own, scores.first),
            (form.soft_cap * LOG2_E, form.kv_heads(group), form.window),
            given,
        )


@triton.jit
def start_of(
    sinks,
    slopes,
    own,
    first,
    heads,
    row,
    query,
    head,
    wanted,
    G: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """(peak, mass, slope, position) of pairs of a row, before any key.

    ``query`` and ``head`` number the row's queries and its group's heads; the row's
    first query is ``first[row]``, token * heads + KV head.
    """
    peak = tl.full(head.shape, float("-inf"), tl.float32)
    mass = tl.zeros(head.shape, tl.float32)
    slope = tl.zeros(head.shape, tl.float32)
    position = tl.zeros(head.shape, tl.int32)
    if SINKS or SLOPES:
        place = tl.load(first + row).to(tl.int32)
        number = place % heads * G + head
        if SINKS:
            peak = tl.load(sinks + number, mask=wanted, other=0.0) * _LOG2_E
            mass = tl.where(peak == float("-inf"), 0.0, 1.0)
        if SLOPES:
            slope = tl.load(slopes + number, mask=wanted, other=0.0) * _LOG2_E
            position = tl.load(own + place // heads + query, mask=wanted, other=0)
    return peak, mass, slope, position


@triton.jit
def bent(
    score,
    slot,
    inside,
    positions,
    cap,
    slope,
    position,
    CAPPED: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Bend ``score [M, N]`` of the tokens in ``slot [N]``, before masks."""
    if CAPPED:
        # tanh of a size is (1 - t) / (1 + t), where t = exp(-2 size).
        size = tl.abs(score) / cap
        t = tl.exp2(size * (-2 * _LOG2_E))
        bounded = (1 - t) / (1 + t) * cap
        score = tl.where(score < 0, -bounded, bounded)
    if SLOPES:
        held = tl.load(positions + slot, mask=inside, other=0)
        distance = held[None, :] - position[:, None]
        score += slope[:, None] * distance.to(tl.float32)
    return score
