# SPDX-License-Identifier: Apache-2.0
"""Random weights for whatever transformers can build, as model directories.

As in :mod:`tests.reference.models`, weights are scaled so that attention is peaked and
the best token is clear. The architecture's own initialisation would leave both flat:
whatever a head sees, greedy replies would be the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.reference.models import ATTENTION_GAIN, LOGIT_GAIN

_QUERIES_AND_KEYS = re.compile(
    r"\.(q|k|qk|q_b|kv_b|kv_a)_(proj|proj_with_mqa)\.|query_key_value|c_attn|\.qkv"
)
_QUERY_AND_KEY_NORMS = re.compile(r"\.(q|k|query|key)_(layer)?norm\.")
_TRANSPOSED = re.compile(r"\.c_(attn|fc|proj)\.")
_OF_THE_RECURRENCE = re.compile(r"A_log|dt_bias|\.D$|time_step")
"""What the architecture starts with: anything else would forget, or never end."""
_LAST_NORM = re.compile(r"^(?!.*layers).*\b(norm|embedding_norm|ln_f)\.weight$")
_FIRST_NORM = re.compile(r"word_embeddings_layernorm\.weight$")
_TIED_GAIN = 0.2
"""Where embeddings are the head too, or each token would be its own successor."""
_SINK = 4.0
"""A sink's logit: as much as a window of scores adds up to."""


def write_random_model(
    model_type: str,
    values: dict[str, Any],
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write the configuration and weights of a model; return ``directory``.

    Args:
        model_type: how transformers calls the architecture.
        values: entries of its configuration.
        directory: where to, made if it is not there.
        dtype: what the weights are stored in.
        seed: of the weights.
    """
    # What is not set below is what the architecture starts with.
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(directory)
    return directory


@torch.no_grad()
def _randomise(model: nn.Module, random: torch.Generator) -> None:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = head is embedding
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=random)
        if weight is head:
            gain = _TIED_GAIN if tied else LOGIT_GAIN
            weight.copy_(noise * gain / weight.shape[-1] ** 0.5)
        elif tied and _LAST_NORM.search(name):
            weight.add_(LOGIT_GAIN / _TIED_GAIN - 1)
        elif tied and _FIRST_NORM.search(name):
            weight.fill_(_TIED_GAIN)
        elif weight is embedding:
            # Gemma multiplies it by the root; what others add to it is normalised.
            weight.copy_(noise / weight.shape[-1] ** 0.5)
        elif not _OF_THE_RECURRENCE.search(name):
            _fill(name, weight, noise)


def _fill(name: str, weight: Tensor, noise: Tensor) -> None:
    """Set a matrix, ``[out, in]`` or ``[experts, ., .]``, a norm, a bias or a sink."""
    if name.endswith("sinks"):
        weight.copy_(_SINK + noise)
    elif _QUERY_AND_KEY_NORMS.search(name) and weight.dim() == 1:
        # The weight of a norm is added to one, or is one: what it starts as tells.
        weight.add_(ATTENTION_GAIN - 1 + 0.1 * noise)
    elif weight.dim() == 1:
        # Every token has the biases, and so averages of tokens have more of them.
        weight.add_((0.02 if name.endswith("bias") else 0.1) * noise)
    elif weight.shape[1] == 1:
        # A convolution of each channel, [channels, 1, taps].
        weight.copy_(noise / weight.shape[-1] ** 0.5)
    else:
        gain = ATTENTION_GAIN if _QUERIES_AND_KEYS.search(name) else 1.0
        is_transposed = weight.dim() > 2 or _TRANSPOSED.search(name)
        inputs = -2 if is_transposed else -1
        # What an activation adds to every token alike would choose the same token ever.
        noise -= noise.mean(inputs, keepdim=True)
        weight.copy_(noise * gain / weight.shape[inputs] ** 0.5)
