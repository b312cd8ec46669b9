# SPDX-License-Identifier: Apache-2.0
"""Facts of models that people serve: enough of a configuration to plan a cache.

Numbers alone, as their makers publish them; there are no weights and no tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reference.families import FULL, LINEAR, WINDOW


@dataclass(frozen=True)
class Released:
    """A model by its configuration.

    Attributes:
        name: as people know it, and of its folder.
        architecture: the class that serves it.
        model_type: how transformers calls it.
        layers: all of them.
        query_heads, kv_heads, head_size: of those that cache tokens.
        window: tokens that ``windowed`` of these layers see; 0: none does.
        states: layers that keep a state, beside or instead of a cache.
        state_bytes: of one request, over all of these: matrices in float32, as vLLM
            has them on CPUs, and inputs in bfloat16.
        values: what else its configuration has.
    """

    name: str
    architecture: str
    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    values: Mapping[str, Any]
    window: int = 0
    windowed: int = 0
    states: int = 0
    state_bytes: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def has_both(self) -> bool:
        """Whether layers keep a state beside their cache."""
        return self.states == self.layers

    @property
    def cached(self) -> int:
        """Layers that cache tokens."""
        return self.layers if self.has_both else self.layers - self.states

    @property
    def structure(self) -> str:
        """Say what its layers cache."""
        full = self.cached - self.windowed
        parts = [f"{full} full"] if full else []
        if self.windowed:
            parts.append(f"{self.windowed} windows of {self.window}")
        if self.has_both:
            parts.append("each with a state")
        elif self.states:
            parts.append(f"{self.states} states")
        heads = f"{self.kv_heads} x {self.head_size}"
        return f"{', '.join(parts)}; {heads}"

    def write(self, parent: Path) -> Path:
        """Write the configuration below ``parent``; return its folder."""
        folder = parent / self.name
        folder.mkdir(parents=True)
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": 131072,
            "dtype": "bfloat16",
            "tie_word_embeddings": False,
            **self.values,
        }
        folder.joinpath("config.json").write_text(json.dumps(config, indent=2))
        return folder


def _gpt_oss(name: str, layers: int, experts: int) -> Released:
    return Released(
        name,
        "GptOssForCausalLM",
        "gpt_oss",
        layers,
        query_heads=64,
        kv_heads=8,
        head_size=64,
        window=128,
        windowed=layers // 2,
        values={
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "vocab_size": 201088,
            "num_local_experts": experts,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": [WINDOW, FULL] * (layers // 2),
        },
    )


def _delta_net(
    name: str, layers: int, kv_heads: int, experts: int, values: Mapping[str, Any]
) -> Released:
    """Three layers of four keep a state: 32 matrices of 128 x 128, and inputs.

    Those are of the last three tokens, (2 x 16 + 32) x 128 numbers each.
    """
    states = layers * 3 // 4
    return Released(
        name,
        "Qwen3NextForCausalLM",
        "qwen3_next",
        layers,
        query_heads=16,
        kv_heads=kv_heads,
        head_size=256,
        states=states,
        state_bytes=states * (4 * 32 * 128 * 128 + 2 * 3 * 64 * 128),
        values={
            "hidden_size": 2048,
            "num_experts": experts,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * (layers // 4),
            "max_position_embeddings": 262144,
            **values,
        },
    )


MODELS = [
    _gpt_oss("gpt-oss-20b", layers=24, experts=32),
    _gpt_oss("gpt-oss-120b", layers=36, experts=128),
    Released(
        "gemma-3-27b-text",
        "Gemma3ForCausalLM",
        "gemma3_text",
        layers=62,
        query_heads=32,
        kv_heads=16,
        head_size=128,
        window=1024,
        windowed=52,
        values={
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "vocab_size": 262208,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
            "layer_types": ([WINDOW] * 5 + [FULL]) * 10 + [WINDOW] * 2,
        },
    ),
    Released(
        "Qwen3-30B-A3B-2507",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        layers=48,
        query_heads=32,
        kv_heads=4,
        head_size=128,
        values={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "vocab_size": 151936,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "max_position_embeddings": 262144,
        },
    ),
    # The class of Qwen 3.5 imports torchvision, which is not here. Qwen3-Next's keeps
    # states of the same shapes, so it stands in for the numbers of Qwen 3.5.
    _delta_net(
        "Qwen3.5-35B-A3B",
        layers=40,
        kv_heads=2,
        experts=256,
        values={"vocab_size": 248320, "num_experts_per_tok": 8},
    ),
    _delta_net(
        "Qwen3-Next-80B-A3B",
        layers=48,
        kv_heads=2,
        experts=512,
        values={"vocab_size": 151936, "num_experts_per_tok": 10},
    ),
    Released(
        "Llama-3.3-70B",
        "LlamaForCausalLM",
        "llama",
        layers=80,
        query_heads=64,
        kv_heads=8,
        head_size=128,
        values={"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256},
    ),
    Released(
        "GLM-4.5-Air",
        "Glm4MoeForCausalLM",
        "glm4_moe",
        layers=46,
        query_heads=96,
        kv_heads=8,
        head_size=128,
        values={
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "vocab_size": 151552,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
        },
    ),
    Released(
        "Falcon-H1-7B",
        "FalconH1ForCausalLM",
        "falcon_h1",
        layers=44,
        query_heads=12,
        kv_heads=2,
        head_size=128,
        states=44,
        # 24 heads of 128 x 256, and 3 tokens' inputs of 3072 and two times 256.
        state_bytes=44 * (4 * 24 * 128 * 256 + 2 * 3 * (3072 + 2 * 256)),
        values={
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "vocab_size": 130048,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
            "mamba_d_state": 256,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 256,
            "max_position_embeddings": 262144,
        },
    ),
]
