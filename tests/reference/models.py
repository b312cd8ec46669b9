# SPDX-License-Identifier: Apache-2.0
"""Tiny Llamas of random weights, as model directories that vLLM can load.

Weights are scaled so that attention is peaked and the best token is clear: an error in
what a head sees moves the logits by far more than float32 rounding does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from policies.base import Local

ATTENTION_GAIN = 1.5
"""Standard deviation of queries and keys: scores have its square."""
LOGIT_GAIN = 3.0


SCORES = "ScoreLlamaForCausalLM"
"""The architecture in :mod:`tests.reference.score_llama`."""
SINK = 6.0
"""Mean logit of a sink: a window of scores adds up to as much."""

Matrix = Callable[[int, int, float], Tensor]
"""Makes random weights of so many rows and columns, and of this gain."""


@dataclass(frozen=True)
class TinyLlama:
    """Shape of a random model."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int = 256
    vocab_size: int = 512
    max_tokens: int = 4096
    window: int | None = None
    """Last tokens that queries see in every layer but each third."""
    chunk: int | None = None
    """Or those of their own chunk."""

    @property
    def layer_types(self) -> list[str]:
        full = "full_attention"
        kind = "chunked_attention" if self.chunk else "sliding_attention"
        kinds = [kind, kind, full] if self.window or self.chunk else [full] * 3
        return [kinds[layer % 3] for layer in range(self.num_layers)]

    @property
    def local(self) -> tuple[Local | None, ...]:
        """What the queries of each layer see, if there are windows or chunks."""
        tokens = self.window or self.chunk
        if not tokens:
            return ()
        local = Local(tokens, is_chunk=bool(self.chunk))
        return tuple(None if "full" in kind else local for kind in self.layer_types)

    def write(self, parent: Path, seed: int = 0) -> Path:
        """Write ``config.json`` and the weights below ``parent``; return the folder."""
        directory = parent / self.name
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            self._weights(torch.Generator().manual_seed(seed)),
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
        (directory / "config.json").write_text(json.dumps(self._config(), indent=2))
        self._tokenizer().save_pretrained(directory)
        return directory

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """One word a token: token 7 is ``w7``."""
        words = {f"w{token}": token for token in range(self.vocab_size)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")

    def _config(self) -> dict[str, object]:
        local: dict[str, object] = {"layer_types": self.layer_types}
        if self.window:
            local["sliding_window"] = self.window
        if self.chunk:
            local["attention_chunk_size"] = self.chunk
        return (local if self.local else {}) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_query_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        }

    def _weights(self, random: torch.Generator) -> dict[str, Tensor]:
        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=random) * gain / columns**0.5

        hidden, inner = self.hidden_size, self.intermediate_size
        weights = {
            "model.embed_tokens.weight": matrix(self.vocab_size, hidden, hidden**0.5),
            "model.norm.weight": torch.ones(hidden),
            "lm_head.weight": matrix(self.vocab_size, hidden, LOGIT_GAIN),
        }
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            weights |= {
                f"{name}.input_layernorm.weight": torch.ones(hidden),
                f"{name}.post_attention_layernorm.weight": torch.ones(hidden),
                f"{name}.mlp.gate_proj.weight": matrix(inner, hidden),
                f"{name}.mlp.up_proj.weight": matrix(inner, hidden),
                f"{name}.mlp.down_proj.weight": matrix(hidden, inner),
            }
            attention = self._attention_weights(matrix)
            weights |= {f"{name}.self_attn.{key}": w for key, w in attention.items()}
        return weights

    def _attention_weights(self, matrix: Matrix) -> dict[str, Tensor]:
        hidden = self.hidden_size
        query_rows = self.num_query_heads * self.head_size
        kv_rows = self.num_kv_heads * self.head_size
        return {
            "q_proj.weight": matrix(query_rows, hidden, ATTENTION_GAIN),
            "k_proj.weight": matrix(kv_rows, hidden, ATTENTION_GAIN),
            "v_proj.weight": matrix(kv_rows, hidden, 1.0),
            "o_proj.weight": matrix(hidden, query_rows, 1.0),
        }


@dataclass(frozen=True)
class TinyMiniCPM3(TinyLlama):
    """Its layers cache keys of every query head, whatever ``num_kv_heads`` says."""

    rank: int = 48

    def _config(self) -> dict[str, object]:
        return {
            **super()._config(),
            "architectures": ["MiniCPM3ForCausalLM"],
            "model_type": "minicpm3",
            "q_lora_rank": self.rank,
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": self.head_size // 2,
            "qk_rope_head_dim": self.head_size // 2,
            "v_head_dim": self.head_size // 2,
            "scale_emb": 1,
            "scale_depth": self.num_layers**0.5,
            "dim_model_base": self.hidden_size,
        }

    def _attention_weights(self, matrix: Matrix) -> dict[str, Tensor]:
        hidden, rank, heads = self.hidden_size, self.rank, self.num_query_heads
        half = self.head_size // 2
        return {
            "q_a_proj.weight": matrix(rank, hidden, 1.0),
            "q_a_layernorm.weight": torch.ones(rank),
            "q_b_proj.weight": matrix(2 * half * heads, rank, ATTENTION_GAIN),
            "kv_a_proj_with_mqa.weight": matrix(rank + half, hidden, ATTENTION_GAIN),
            "kv_a_layernorm.weight": torch.ones(rank),
            "kv_b_proj.weight": matrix(2 * half * heads, rank, ATTENTION_GAIN),
            "o_proj.weight": matrix(hidden, half * heads, 1.0),
        }


@dataclass(frozen=True)
class TinyScores(TinyLlama):
    """Its scores are not only products; ``chunk`` is for this one alone."""

    num_layers: int = 3
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    hidden_size: int = 128
    sinks: bool = False
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    """ALiBi's, of each query head."""

    def _config(self) -> dict[str, object]:
        return {
            **super()._config(),
            "architectures": [SCORES],
            "layer_types": self.layer_types,
            "has_sinks": self.sinks,
            "soft_cap": self.soft_cap,
            "alibi_slopes": self.slopes,
        }

    def _attention_weights(self, matrix: Matrix) -> dict[str, Tensor]:
        weights = super()._attention_weights(matrix)
        if self.sinks:
            weights["sinks"] = SINK + matrix(self.num_query_heads, 1, 1.0)[:, 0]
        return weights


MHA = TinyLlama(
    "tiny-mha",
    num_layers=4,
    num_query_heads=4,
    num_kv_heads=4,
    head_size=32,
    hidden_size=128,
)
GQA = TinyLlama(
    "tiny-gqa",
    num_layers=3,
    num_query_heads=6,
    num_kv_heads=2,
    head_size=64,
    hidden_size=192,
)
MQA = TinyLlama(
    "tiny-mqa",
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=1,
    head_size=64,
    hidden_size=128,
)
LATENT = TinyMiniCPM3(
    "tiny-minicpm3",
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=64,
    hidden_size=128,
)
WINDOW = TinyLlama(
    "tiny-window",
    num_layers=6,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=32,
    hidden_size=128,
    window=50,
)
"""A window that is no whole number of pages, in four layers of six."""
LONG = TinyLlama(
    "tiny-long",
    num_layers=5,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=32,
    hidden_size=128,
    max_tokens=8192,
)
"""Ten KV heads, so that 20 % of them is a whole number."""
SINKS = TinyScores("tiny-sinks", sinks=True)
CAP = TinyScores("tiny-cap", soft_cap=3.0)
ALIBI = TinyScores("tiny-alibi", slopes=(0.3, 0.1, 0.03, 0.01))
CHUNK = TinyScores("tiny-chunk", num_layers=6, chunk=96)
MIXED = TinyScores("tiny-mixed", num_layers=6, window=50, sinks=True, soft_cap=3.0)
