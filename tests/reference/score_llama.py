# SPDX-License-Identifier: Apache-2.0
"""A Llama for vLLM whose layers score keys and see them as its configuration says.

Of real families each has some of this alone: gpt-oss sinks, Gemma 2 a soft cap, BLOOM
slopes, Llama 4 chunks. :class:`tests.reference.models.TinyScores` makes some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)
from vllm.model_executor.models.utils import extract_layer_index

from tests.reference.models import SCORES


class _ScoreAttention(LlamaAttention):
    def __init__(self, config: Any, *args: Any, prefix: str, **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        del layers[f"{prefix}.attn"]  # Llama's own
        common = {
            "num_heads": self.num_heads,
            "head_size": self.head_dim,
            "scale": self.scaling,
            "num_kv_heads": self.num_kv_heads,
            "cache_config": get_current_vllm_config().cache_config,
            "prefix": f"{prefix}.attn",
        }
        kind = config.layer_types[extract_layer_index(prefix)]
        if kind == "chunked_attention":
            self.attn = ChunkedLocalAttention(
                attention_chunk_size=config.attention_chunk_size, **common
            )
            return
        if config.has_sinks:
            self.sinks = nn.Parameter(torch.zeros(self.num_heads))
            common["sinks"] = self.sinks
        self.attn = Attention(
            alibi_slopes=config.alibi_slopes,
            logits_soft_cap=config.soft_cap,
            per_layer_sliding_window=config.sliding_window
            if kind == "sliding_attention"
            else None,
            **common,
        )


class _ScoreLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=_ScoreAttention)


class ScoreLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_ScoreLayer)


def register() -> None:
    """Let vLLM know of it, in this process."""
    ModelRegistry.register_model(SCORES, ScoreLlamaForCausalLM)
