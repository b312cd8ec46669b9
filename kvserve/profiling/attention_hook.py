# SPDX-License-Identifier: Apache-2.0
"""Puts attention of our own into a Hugging Face model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional


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


class PromptAttention(ABC):
    """Causal attention of a whole prompt at once, without a cache and padding.

    A layer whose own window is shorter than the prompt attends as the model has it:
    no policy decides on it.

    Attributes:
        name: under which the library registers it, for the whole process.
    """

    name: ClassVar[str]

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here."""
        install_attention(model, self.name, self, no_mask)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as the library asks for it, tokens before heads in the output."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window")
        if window and window < query.shape[2]:
            self.pass_over(module.layer_idx, key)
            output = _attend_window(query, key, value, scale, window)
        else:
            output = self.attend(module.layer_idx, query, key, value, scale)
        return output.transpose(1, 2).contiguous(), None

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attend; shapes ``[1, H_q, n, d]`` and ``[1, H_kv, n, d]``."""

    def pass_over(self, layer: int, key: Tensor) -> None:
        """Take note of a layer that has a window of its own; ``key`` as above."""
        return


def _attend_window(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> Tensor:
    """Let each query see the last ``window`` tokens, its own included."""
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    seen = seen.triu(1 - window).to(key.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )
