# SPDX-License-Identifier: Apache-2.0
"""Puts attention of our own into a Hugging Face model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvserve.errors import UserError


def install_attention(
    model: Any, name: str, attend: Callable[..., Any], mask: Callable[..., Any]
) -> None:
    """Make ``model`` compute its attention with ``attend``.

    Args:
        name: under which the library registers both, for the whole process.
        attend, mask: as those two interfaces want them.

    Raises:
        UserError: the library lets nobody replace the attention of such a model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:
        raise _cannot_measure("computes its attention by itself")


def remember_one_layer(model: Any) -> None:
    """Prepare for a backward pass that has the tensors of one layer at a time.

    Layers are computed anew when the backward pass reaches them; the models' own switch
    for it works in training mode only, where dropout must not.
    """
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend; shapes ``[H_q, n, d]`` and ``[H_kv, n, d]``."""
    group = len(query) // len(key)
    return functional.scaled_dot_product_attention(
        query[None],
        key.repeat_interleave(group, 0)[None],
        value.repeat_interleave(group, 0)[None],
        is_causal=True,
        scale=scale,
    )[0]


def causal_weights(query: Tensor, keys: Tensor, first: int) -> Tensor:
    """Causal attention probabilities of scaled queries from ``first`` on."""
    scores = query @ keys.T
    own = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device)
    scores[:, first:].masked_fill_(own.triu(1), float("-inf"))
    return scores.softmax(-1)


def _cannot_measure(why: str) -> UserError:
    return UserError(
        f"MODEL: it {why}, which profiles cannot measure; choose a policy that needs "
        "none, such as sink-recent"
    )


class PromptAttention(ABC):
    """Causal attention of a whole prompt at once, without a cache and padding.

    A layer whose own window or chunk is shorter than the prompt attends as the model
    has it: no policy decides on it.

    Attributes:
        name: under which the library registers it, for the whole process.
    """

    name: ClassVar[str]

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here.

        Raises:
            UserError: that cannot be done.
        """
        from transformers.masking_utils import sdpa_mask

        install_attention(model, self.name, self, sdpa_mask)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as the library asks for it, tokens before heads in the output.

        Raises:
            UserError: scores are capped, or have sinks.
        """
        if softcap is not None:
            raise _cannot_measure("caps its scores")
        if s_aux is not None:
            raise _cannot_measure("has attention sinks")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if attention_mask is None or _is_causal(attention_mask):
            output = self.attend(module.layer_idx, query, key, value, scale)
        else:
            self.pass_over(module.layer_idx, key)
            output = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attention_mask,
                scale=scale,
                enable_gqa=True,
            )
        return output.transpose(1, 2).contiguous(), None

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attend; shapes ``[1, H_q, n, d]`` and ``[1, H_kv, n, d]``."""

    def pass_over(self, layer: int, key: Tensor) -> None:
        """Take note of a layer with a window or chunks of its own; ``key`` as above."""
        return


class PlainAttention(PromptAttention):
    """Attention that knows queries and keys as they were before their rotation too."""

    def __init__(self) -> None:
        self._plain: dict[tuple[str, int], Tensor] = {}
        self._hooks: list[Any] = []

    def attach(self, model: Any) -> None:
        super().attach(model)
        for module in model.modules():
            for kind in ("q", "k") if hasattr(module, "layer_idx") else ():
                norm = getattr(module, f"{kind}_norm", None)
                last = norm or getattr(module, f"{kind}_proj", None)
                if last is not None:
                    note = self._noting(kind, module.layer_idx)
                    self._hooks.append(last.register_forward_hook(note))

    def detach(self) -> None:
        """Look at the model no longer, before another is attached to it."""
        for hook in self._hooks:
            hook.remove()

    def _noting(self, kind: str, layer: int) -> Any:
        def note(_module: Any, _inputs: Any, output: Tensor) -> None:
            self._plain[kind, layer] = output.detach()

        return note

    def plain(self, kind: Literal["q", "k"], layer: int, rotated: Tensor) -> Tensor:
        """Return the queries or keys that became ``rotated``; once in each pass.

        Args:
            rotated: ``[1, heads, n, d]``.

        Returns:
            ``[heads, n, d]``.

        Raises:
            UserError: the model does not show them.
        """
        if (kind, layer) not in self._plain:
            raise UserError(
                "MODEL: its layers project queries, keys and values together, which "
                "this profile cannot tell apart; choose a policy that learns nothing, "
                "such as keydiff"
            )
        _, heads, tokens, size = rotated.shape
        return self._plain.pop((kind, layer)).view(tokens, heads, size).transpose(0, 1)

    def pass_over(self, layer: int, key: Tensor) -> None:
        for kind in ("q", "k"):
            self._plain.pop((kind, layer), None)


def _is_causal(mask: Tensor) -> bool:
    """Whether each query of a mask, ``[1, 1, n, n]``, sees everything before it."""
    tokens = mask.shape[-1]
    return int(mask[0, 0].sum()) == tokens * (tokens + 1) // 2
