# SPDX-License-Identifier: Apache-2.0
"""What this version can serve. Everything else is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from kvserve.engine.devices import hardware
from kvserve.engine.settings import PolicySettings
from kvserve.errors import UserError
from kvserve.kernels.page_formats import FORMATS, FP8, INT8, PageFormat
from kvserve.plan.rule import Rule, rule_under
from policies.base import ModelShape, Policy
from policies.budgets import PolicySpec
from policies.files import follows_files

_WAY_OUT = "serve it with stock vLLM (`--policy none`)"
_DENSE_EVERY = "dense_attention_every_n_layers"


def model_shape_of(vllm_config: VllmConfig) -> ModelShape:
    """Read the shape of the model that a config names, whatever ranks share it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_kv_heads, head_size = _cached_heads(model)
    return ModelShape(
        name=Path(model.model).name,
        num_layers=model.get_num_layers(parallel),
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_tokens=model.max_model_len,
        pattern=_declared_pattern(model.hf_text_config),
    )


def _cached_heads(model: ModelConfig) -> tuple[int, int]:
    """KV heads that layers cache, and their size; :func:`check_layers` compares both.

    A model that compresses keys to a latent vector, but whose layers are no MLA
    (MiniCPM3), caches keys of every query head, whatever heads its config names.
    """
    text = model.hf_text_config
    if getattr(text, "kv_lora_rank", None) and not model.use_mla:
        heads = model.model_arch_config.total_num_attention_heads
        return heads, text.qk_nope_head_dim + text.qk_rope_head_dim
    return model.get_total_num_kv_heads(), model.get_head_size()


def _declared_pattern(text_config: Any) -> tuple[tuple[str, Any], ...]:
    """Entries by which a configuration declares block-sparse attention."""
    entries = text_config.to_dict().items()
    return tuple(
        sorted(
            (name, value)
            for name, value in entries
            if name.startswith("blocksparse_") or name == _DENSE_EVERY
        )
    )


def rule_of(vllm_config: VllmConfig) -> Rule:
    """Return what makes the page plan of each request, under the config's policy."""
    settings = PolicySettings.from_config(vllm_config)
    model = model_shape_of(vllm_config)
    policy = _policy_of(settings.spec, model)
    page_size = vllm_config.cache_config.block_size
    max_tokens = vllm_config.model_config.max_model_len
    ranks = vllm_config.parallel_config.tensor_parallel_size
    shared = vllm_config.cache_config.enable_prefix_caching
    scheduler = vllm_config.scheduler_config
    return rule_under(
        policy,
        model,
        page_size,
        max_tokens,
        ranks=ranks,
        in_flight=vllm_config.max_in_flight_tokens if shared else 0,
        mixed=settings.allow_request_policies,
        step_tokens=scheduler.max_num_batched_tokens - scheduler.max_num_seqs,
    )


@follows_files
@lru_cache(maxsize=4)
def _policy_of(spec: PolicySpec, model: ModelShape) -> Policy:
    """Several parts of a process ask, and a budget may take a search to translate."""
    return spec.create(model)


def page_format_of(vllm_config: VllmConfig) -> PageFormat | None:
    """What pages hold, as --kv-cache-dtype asks; ``None``: the model's own type.

    Raises:
        UserError: they cannot hold that, or not on this device.
    """
    asked, own = pages_hold(vllm_config), _type_of(vllm_config)
    if asked == own:
        return None
    if asked not in FORMATS:
        raise UserError(
            f"--kv-cache-dtype={asked}: cannot hold what a model in {own} caches under "
            f"a policy; choose {', '.join(FORMATS)} or {own}"
        )
    if asked == FP8.name and not hardware.takes_fp8():
        raise UserError(
            f"--kv-cache-dtype={asked}: GPUs store fp8 since compute capability 8.9; "
            f"use {INT8.name}, or leave it out"
        )
    return FORMATS[asked]


def pages_hold(vllm_config: VllmConfig) -> str:
    """Name what pages hold, also where that is the model's own type."""
    asked = vllm_config.cache_config.cache_dtype
    return _type_of(vllm_config) if asked == "auto" else asked


def _type_of(vllm_config: VllmConfig) -> str:
    return str(vllm_config.model_config.dtype).removeprefix("torch.")


def scratch_of(vllm_config: VllmConfig, rule: Rule) -> int:
    """Pages that prefill needs beside what requests hold."""
    scheduler = vllm_config.scheduler_config
    return rule.scratch_pages(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)


def fits(rule: Rule, tokens: int, pool: int) -> int:
    """Count the requests of ``tokens`` tokens that ``pool`` pages hold at once."""
    # All but the last to come have read their prompts.
    return max((pool - rule.most_pages(tokens)) // rule.pages(tokens) + 1, 0)


def check_batch(vllm_config: VllmConfig, rule: Rule) -> None:
    """Refuse steps too short for the last chunk of a dense prefill.

    Raises:
        UserError: names the flag and the least value.
    """
    scheduler = vllm_config.scheduler_config
    least = rule.observed + scheduler.max_num_seqs
    if rule.observed and scheduler.max_num_batched_tokens < least:
        raise UserError(
            f"--max-num-batched-tokens={scheduler.max_num_batched_tokens}: policy "
            f"{rule.policy.name} reads the end of a prompt in one step beside "
            f"--max-num-seqs={scheduler.max_num_seqs} others; give at least {least}"
        )


def check_model(vllm_config: VllmConfig) -> None:
    """Refuse, by its configuration alone, a model that cannot be paged per head.

    Raises:
        UserError: names the model, what it has and the way out.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    kinds = {
        "MLA": model.use_mla,
        "Mamba or linear-attention": model.is_hybrid or model.is_attention_free,
        "encoder-decoder": model.is_encoder_decoder,
        "pooling": model.runner_type != "generate",
        "built-in sliding-window": _has_sliding_window(text),
    }
    for kind, present in kinds.items():
        if present:
            raise _unsupported(model.model, kind)


def _has_sliding_window(text_config: Any) -> bool:
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    # Qwen2-like configs name a window that `use_sliding_window` switches off.
    enabled = getattr(text_config, "use_sliding_window", True)
    return bool(enabled and getattr(text_config, "sliding_window", None))


def check_layers(vllm_config: VllmConfig, layers: Mapping[str, Attention]) -> None:
    """Refuse a loaded model with layers that head pages cannot hold.

    The backstop of :func:`check_model` for what a configuration does not tell.

    Raises:
        UserError: names the model, the layer's kind and the way out.
    """
    name = vllm_config.model_config.model
    context = vllm_config.compilation_config.static_forward_context
    for layer_name, layer in context.items():
        is_other = isinstance(layer, AttentionLayerBase)
        if is_other and layer_name not in layers:
            raise _unsupported(name, type(layer).__name__)
    if not layers:
        raise _unsupported(name, "no attention")
    for layer in layers.values():
        if layer.attn_type != AttentionType.DECODER:
            raise _unsupported(
                name, f"{AttentionType(layer.attn_type).value} attention"
            )
        if layer.sliding_window is not None:
            raise _unsupported(name, "built-in sliding-window")
        if layer.kv_sharing_target_layer_name is not None:
            raise _unsupported(name, "KV-sharing")
        if getattr(layer.impl, "has_bias", False):
            raise _unsupported(name, "learned-sink, ALiBi or soft-capped")
    shapes = {(v.num_heads, v.num_kv_heads, v.head_size) for v in layers.values()}
    if len(shapes) > 1 or any(v.head_size != v.head_size_v for v in layers.values()):
        raise _unsupported(name, "unequal")
    _check_shape(vllm_config, len(layers), *shapes.pop())


def _check_shape(
    vllm_config: VllmConfig, layers: int, query_heads: int, kv_heads: int, size: int
) -> None:
    """Refuse layers that are not those for which pages were planned."""
    model = model_shape_of(vllm_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    planned = (
        model.num_layers,
        model.num_query_heads // ranks,
        max(model.num_kv_heads // ranks, 1),
        model.head_size,
    )
    found = layers, query_heads, kv_heads, size
    if found != planned:
        names = "layers", "query heads", "KV heads", "numbers a head"
        told, has = (
            ", ".join(f"{count} {name}" for count, name in zip(one, names, strict=True))
            for one in (planned, found)
        )
        raise UserError(
            f"MODEL {vllm_config.model_config.model}: its configuration tells of "
            f"{told}, but it has {has}; {_WAY_OUT}"
        )


def _unsupported(model: str, kind: str) -> UserError:
    return UserError(
        f"MODEL {model}: has {kind} layers, which kvserve cannot page per head; "
        f"{_WAY_OUT}"
    )
