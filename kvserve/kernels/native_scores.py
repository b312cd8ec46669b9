# SPDX-License-Identifier: Apache-2.0
"""What ``scores.h`` calls ``Scores``, made of a form; no form costs nothing."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvserve.kernels.score_form import Positions, ScoreForm, positions_for

_ARRAYS = ("sinks", "slopes", "positions", "own")


class Scores(ctypes.Structure):
    """Fields as in ``scores.h``; whoever calls keeps the tensors."""

    _fields_ = (
        ("soft_cap", ctypes.c_float),
        ("kv_heads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("window", ctypes.c_int64),
    )


def scores_of(
    form: ScoreForm | None,
    kv_heads: int,
    query_heads: int,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Scores | None:
    """Lay a form out for C++.

    Args:
        kv_heads, query_heads: that the call has in all.
        positions: of cached tokens and of those that ask, as :func:`places_of` gives
            them; ``None`` where keys stand in order.

    Raises:
        ValueError: the form is of other heads.
    """
    if not form:
        return None
    sinks, slopes = form.sink_logits, form.alibi_slopes
    for each in (sinks, slopes):
        if each is not None and len(each) != query_heads:
            raise ValueError(
                f"kvserve's kernels take a form of {query_heads} query heads, "
                f"not of {len(each)}"
            )
    arrays = (sinks, slopes, *(positions or (None, None)))
    places = [None if array is None else array.data_ptr() for array in arrays]
    return Scores(form.soft_cap, kv_heads, *places, form.window)


def places_of(
    form: ScoreForm | None,
    positions: Positions | None,
    slots: tuple[int, int],
    tokens: int,
) -> tuple[Tensor, Tensor] | None:
    """Return positions of slots and of ``tokens`` that ask, if a form wants them.

    Args:
        slots: pages, and slots of each.

    Raises:
        ValueError: there are none, or fewer, or they are of another type.
    """
    wanted = positions_for(form, positions)
    if wanted is None:
        return None
    cached, own = wanted.cached, wanted.own
    fits = cached.shape == slots and len(own) >= tokens
    for each in (cached, own):
        fits = fits and each.is_contiguous() and each.dtype == torch.int32
    if not fits:
        raise ValueError("kvserve's kernels take a position of each slot and query")
    return cached, own
