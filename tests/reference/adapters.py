# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters, and the model that each makes when it is merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_RANK, _ALPHA = 8, 16
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(model: Path, directory: Path, seed: int) -> Path:
    """Write an adapter of a model's attention, as PEFT does; return its folder."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(_MODULES):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            down = torch.randn(_RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, _RANK, generator=generator) * float(weight.std())
            parts[f"{stem}.lora_A.weight"] = down
            parts[f"{stem}.lora_B.weight"] = up
    save_file(parts, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "target_modules": list(_MODULES),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merge_adapter(model: Path, adapter: Path, directory: Path) -> Path:
    """Write the model with an adapter added to its weights; return its folder."""
    shutil.copytree(model, directory)
    weights = load_file(model / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in [*weights]:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in parts:
            product = parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"]
            weights[name] = weights[name] + product * (_ALPHA / _RANK)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
