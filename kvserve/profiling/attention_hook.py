# SPDX-License-Identifier: Apache-2.0
"""Puts attention of our own into a Hugging Face model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor


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
        output = self.attend(module.layer_idx, query, key, value, scale)
        return output.transpose(1, 2).contiguous(), None

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attend; shapes ``[1, H_q, n, d]`` and ``[1, H_kv, n, d]``."""
