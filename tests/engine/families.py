# SPDX-License-Identifier: Apache-2.0
"""Every family of models that vLLM serves on a CPU, as a tiny random model each.

Windows and chunks are short, and some no multiple of a page, so that prompts pass them.
Three that need no special treatment are controls. What is not here, vLLM's CPU build
does not serve: MPT and Bamba are gone from it, Jamba's Mamba 1 has no kernel, Kimi
Linear's kernels do not register, and Qwen 3.5 wants torchvision.
"""

from __future__ import annotations

from tests.engine.recurrent_families import RECURRENT
from tests.reference.families import FULL, VOCAB, WINDOW, Family, shape

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
_FALCON = {
    **_TOKENS,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
    "tie_word_embeddings": False,
}
_GEMMA3 = shape(
    head_dim=32, sliding_window=48, query_pre_attn_scalar=32, num_hidden_layers=6
)
_GEMMA4 = shape(
    head_dim=32,
    global_head_dim=64,
    sliding_window=48,
    num_hidden_layers=6,
    layer_types=[WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL],
)
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 32}
_SHARING = (
    "window 48",
    "window 48",
    "full",
    "window 48, shares 1",
    "window 48, shares 1",
    "full, shares 2",
)

_ALIKE = [
    Family("llama", "llama", shape(head_dim=32), ("full",) * 4, served=True),
    Family("qwen3", "qwen3", shape(head_dim=32), ("full",) * 4, served=True),
    Family(
        "gpt2",
        "gpt2",
        {
            **_TOKENS,
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 1024,
            "tie_word_embeddings": False,
        },
        ("full",) * 4,
        served=True,
    ),
    Family(
        "llama-mqa",
        "llama",
        shape(head_dim=32, num_key_value_heads=1),
        ("full",) * 4,
        served=True,
    ),
    Family(
        "falcon",
        "falcon",
        {**_FALCON, "multi_query": True},
        ("full",) * 4,
        served=True,
    ),
    Family(
        "minicpm3",
        "minicpm3",
        shape(
            kv_lora_rank=64,
            q_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            scale_emb=1,
            scale_depth=2.0,
            dim_model_base=128,
        ),
        ("full",) * 4,
        served=True,
    ),
]
"""All layers are alike, and see everything."""

_WINDOWS = [
    Family(
        "mistral",
        "mistral",
        shape(head_dim=32, sliding_window=50),
        ("window 50",) * 4,
        served=True,
    ),
    Family(
        "gemma2",
        "gemma2",
        shape(
            head_dim=32,
            sliding_window=64,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=5.0,
            layer_types=[WINDOW, FULL, WINDOW, FULL],
            tie_word_embeddings=True,
        ),
        ("window 64, cap", "full, cap") * 2,
        seed=2,
        served=True,
    ),
    Family(
        "gemma3",
        "gemma3_text",
        _GEMMA3,
        ("window 48",) * 5 + ("full",),
        served=True,
    ),
    Family(
        "cohere2",
        "cohere2",
        shape(
            sliding_window=50,
            layer_types=[WINDOW, WINDOW, WINDOW, FULL],
            tie_word_embeddings=True,
            logit_scale=1.0,
        ),
        # Its configuration counts the tokens before the query's own.
        ("window 51",) * 3 + ("full",),
        served=True,
    ),
    Family(
        "olmo3",
        "olmo3",
        shape(sliding_window=64, layer_types=[WINDOW, WINDOW, WINDOW, FULL]),
        ("window 64",) * 3 + ("full",),
        served=True,
    ),
    Family(
        "exaone4",
        "exaone4",
        shape(sliding_window=48, layer_types=[WINDOW, WINDOW, WINDOW, FULL]),
        ("window 48",) * 3 + ("full",),
        served=True,
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        shape(
            head_dim=32,
            intermediate_size=128,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=48,
            layer_types=[WINDOW, FULL, WINDOW, FULL],
        ),
        ("window 48, sink", "full, sink") * 2,
        served=True,
    ),
    Family(
        "mimo-v2",
        "mimo_v2_flash",
        shape(
            head_dim=32,
            v_head_dim=32,
            sliding_window=48,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            layer_types=[FULL, WINDOW, WINDOW, FULL],
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            # vLLM reads these names, and transformers those above.
            hybrid_layer_pattern=[0, 1, 1, 0],
            moe_layer_freq=[0, 1, 1, 1],
            layernorm_epsilon=1e-5,
            sliding_window_size=48,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=32,
            swa_v_head_dim=32,
            add_swa_attention_sink_bias=True,
        ),
        ("full", "window 48, sink", "window 48, sink", "full"),
        served=True,
    ),
    Family(
        "llama4",
        "llama4_text",
        shape(
            head_dim=32,
            intermediate_size_mlp=256,
            intermediate_size=128,
            num_local_experts=4,
            attention_chunk_size=96,
        ),
        ("chunk 96",) * 3 + ("full",),
        served=True,
    ),
]
"""Some layers see a window, or the chunk of the query; scores may be capped."""

_BIASED = [
    Family(
        "bloom",
        "bloom",
        {**_TOKENS, "hidden_size": 128, "n_layer": 4, "n_head": 4},
        ("full, alibi",) * 4,
        served=True,
    ),
    Family(
        "falcon-alibi",
        "falcon",
        {
            **_FALCON,
            "multi_query": False,
            "alibi": True,
            "parallel_attn": False,
            "bias": True,
        },
        ("full, alibi",) * 4,
        seed=4,
        served=True,
    ),
]
"""Scores fall with the distance."""

_SHARED = [
    Family(
        "gemma3n",
        "gemma3n_text",
        shape(
            **_PER_LAYER,
            head_dim=32,
            sliding_window=48,
            num_hidden_layers=6,
            layer_types=[WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL],
            num_kv_shared_layers=3,
            laurel_rank=16,
            tie_word_embeddings=True,
        ),
        _SHARING,
        served=True,
    ),
    Family(
        "gemma4",
        "gemma4_text",
        {**_GEMMA4, **_PER_LAYER, "num_kv_shared_layers": 3},
        _SHARING,
        served=True,
        within=4e-3,
    ),
    Family(
        "gemma4-unequal",
        "gemma4_text",
        {
            **_GEMMA4,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        },
        ("window 48", "window 48", "full") * 2,
        served=True,
        within=4e-3,
    ),
]
"""Layers read another layer's keys, or have heads of another size and number."""

FAMILIES = [*_ALIKE, *_WINDOWS, *_BIASED, *_SHARED, *RECURRENT]
