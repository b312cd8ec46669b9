# SPDX-License-Identifier: Apache-2.0
"""Families some of whose layers keep a state, or one latent vector for all heads."""

from __future__ import annotations

from tests.reference.families import FULL, LINEAR, Family, shape

_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
    "mamba_expand": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT = {
    # vLLM's kernel has one size: 576 numbers.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT_OPTIONS = {"block_size": 16, "max_num_batched_tokens": 1024}

RECURRENT = [
    Family(
        "falcon-h1",
        "falcon_h1",
        shape(**_MAMBA2, mamba_d_ssm=256),
        ("full", "mamba2") * 4,
        served=True,
    ),
    Family(
        "granite4",
        "granitemoehybrid",
        shape(
            **_MAMBA2,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=128,
            attention_multiplier=32**-0.5,
            position_embedding_type="rope",
            layer_types=["mamba", "attention", "mamba", "attention"],
        ),
        ("mamba2", "full") * 2,
        served=True,
    ),
    Family(
        "nemotron-h",
        "nemotron_h",
        shape(
            head_dim=32,
            num_hidden_layers=6,
            layers_block_type=["mamba", "mlp", "attention"] * 2,
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=32,
            n_groups=1,
            chunk_size=64,
        ),
        ("mamba2", "full") * 2,
        served=True,
    ),
    Family(
        "lfm2",
        "lfm2",
        shape(
            layer_types=["conv", FULL, "conv", FULL],
            conv_dim=128,
            block_dim=128,
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        ),
        ("short_conv", "full") * 2,
        served=True,
        steady=False,
    ),
    Family(
        "qwen3-next",
        "qwen3_next",
        shape(
            **_EXPERTS,
            head_dim=32,
            num_experts=4,
            shared_expert_intermediate_size=128,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        ),
        ("gdn_attn",) * 3 + ("full",),
        served=True,
        dtype="bfloat16",
    ),
    Family(
        "deepseek-v2",
        "deepseek_v2",
        shape(**_LATENT, **_EXPERTS),
        ("latent",) * 4,
        options=_LATENT_OPTIONS,
        steady=False,
    ),
    Family(
        "deepseek-v3",
        "deepseek_v3",
        shape(
            **_LATENT,
            **_EXPERTS,
            num_nextn_predict_layers=0,
            num_mtp_layers=0,
            topk_method="noaux_tc",
        ),
        ("latent",) * 4,
        options=_LATENT_OPTIONS,
        steady=False,
    ),
]
