# SPDX-License-Identifier: Apache-2.0
"""What an evaluation knows of a model: what its engine will plan for."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Gemma3TextConfig

from kvserve.errors import UserError
from kvserve.evaluation.model import shape_of
from policies.base import Local


def test_a_model_has_the_windows_that_its_engine_plans(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=512,
        layer_types=kinds,
        max_position_embeddings=2048,
        architectures=["Gemma3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape.local == (Local(512), None)
    assert shape.open.num_layers == 1
    assert shape.up_to(513) == shape.up_to(513).up_to(2048).up_to(513)
    assert shape.up_to(512).open.num_layers == 2


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        shape_of(str(tmp_path))
