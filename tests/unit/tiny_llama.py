# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama for tests of the profilers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.byte_tokenizer import byte_tokenizer

LAYERS, QUERY_HEADS, KV_HEADS = 3, 6, 2


def tiny_llama(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Three layers, six query heads over two KV heads, at most 1024 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        # Large weights give sharp attention and answers that vary.
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_llama(folder: Path, max_tokens: int = 1024) -> str:
    """Save one that reads bytes, and its tokenizer; return the folder."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = max_tokens
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
