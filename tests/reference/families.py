# SPDX-License-Identifier: Apache-2.0
"""What a row of the table of families is, and the sizes that they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.reference.random_models import write_random_model

VOCAB = 512
WINDOW = "sliding_attention"
FULL = "full_attention"
LINEAR = "linear_attention"


@dataclass(frozen=True)
class Family:
    """A tiny random model with layers of certain kinds.

    Attributes:
        name: of the row, and of the model's folder.
        model_type: how transformers calls the architecture.
        values: its configuration, beside transformers' defaults.
        kinds: of the layers that cache something, as the engine's tell them.
        served: policies serve it; otherwise its start is refused.
        dtype: what vLLM's CPU kernels of the family take.
        options: of vLLM, beside those of every test.
        seed: of the weights; some make a model that repeats itself.
        steady: stock vLLM's replies do not depend on what else is in the batch. Where
            they do, they are not those of transformers either, even alone.
        within: how far log probabilities may differ: Gemma 4 does not scale its scores,
            and stock vLLM's are 0.0012 from those in float64, `full`'s 0.0007.
    """

    name: str
    model_type: str
    values: Mapping[str, Any]
    kinds: tuple[str, ...]
    served: bool = False
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    steady: bool = True
    within: float = 1e-3

    def __str__(self) -> str:
        return self.name

    def write(self, parent: Path) -> Path:
        """Write the model below ``parent``; return its folder."""
        return write_random_model(
            self.model_type,
            dict(self.values),
            parent / self.name,
            dtype=getattr(torch, self.dtype),
            seed=self.seed,
        )

    @property
    def engine_options(self) -> dict[str, Any]:
        """Prompts are token ids: there is no tokenizer."""
        return {"dtype": self.dtype, "skip_tokenizer_init": True, **self.options}


def shape(**values: Any) -> dict[str, Any]:
    """Sizes as most configurations call them: 4 layers of 4 query heads, 2 KV heads."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **values,
    }
