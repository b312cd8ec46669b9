# SPDX-License-Identifier: Apache-2.0
"""Puts attention of our own into a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def no_mask(*_: Any, **__: Any) -> None:
    """Spare the model a mask: one prompt without padding is causal by itself."""


def install_attention(
    model: Any, name: str, attend: Callable[..., Any], mask: Callable[..., Any]
) -> None:
    """Make ``model`` compute its attention with ``attend``.

    Args:
        name: under which the library registers both, for the whole process.
        attend, mask: as those two interfaces want them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
