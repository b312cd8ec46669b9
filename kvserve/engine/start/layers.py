# SPDX-License-Identifier: Apache-2.0
"""What a model's layers are: as its configuration tells, and as they are once loaded.

Pages are planned by the configuration, in every process alike; the worker compares it
with the layers. What this version cannot serve is refused in one line.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models import ModelRegistry
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import AttentionType

from kvserve.engine.devices import hardware
from kvserve.errors import UserError
from kvserve.plan.layout import layout_of
from policies.base import Local, ModelShape

_WAY_OUT = "serve it with stock vLLM (`--policy none`)"
_DENSE_EVERY = "dense_attention_every_n_layers"
_KNOWN = {
    "full_attention",
    "attention",
    "hybrid",  # a state beside it
    "sliding_attention",
    "chunked_attention",
}
_STATELESS = (_KNOWN | {"mlp", "moe"}) - {"hybrid"}
_SLIDES = "use_sliding_window"
_SEES_ONE_MORE = {"cohere2"}
"""Model types whose window of ``n`` is ``n`` tokens beside the query's own."""


def model_shape_of(vllm_config: VllmConfig) -> ModelShape:
    """Read the shape of the model that a config names, whatever ranks share it."""
    model = vllm_config.model_config
    num_kv_heads, head_size = _cached_heads(model)
    by_layer = _unequal_heads(vllm_config)
    if by_layer:
        head_size = max(size for _, size in by_layer)
    shape = ModelShape(
        name=Path(model.model).name,
        num_layers=len(_kinds(vllm_config)),
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_tokens=model.max_model_len,
        pattern=_declared_pattern(model.hf_text_config),
        local=_local_layers(model, _kinds(vllm_config)),
        reread=_reread(vllm_config),
        layer_heads=by_layer,
    )
    if not by_layer:
        return shape
    most_lanes = max(layer.num_lanes for layer in layout_of(shape))
    return dataclasses.replace(shape, num_kv_heads=most_lanes)


def _unequal_heads(vllm_config: VllmConfig) -> tuple[tuple[int, int], ...]:
    """KV heads of each layer and their size; empty if all layers are alike."""
    text = vllm_config.model_config.hf_text_config
    by_layer = getattr(text, "per_layer_config", None)
    if not by_layer:
        return ()
    own = by_layer[: len(_kinds(vllm_config))]
    # Models of equal layers may call these otherwise, or leave them out.
    heads = tuple(
        (getattr(one, "num_key_value_heads", 0), getattr(one, "head_dim", 0))
        for one in own
    )
    return heads if len(set(heads)) > 1 else ()


def _reread(vllm_config: VllmConfig) -> tuple[int, ...]:
    """Layers whose cache the last ones read too: of each kind the last that has one."""
    own, shared = _kinds(vllm_config), _shared_kinds(vllm_config)
    last = {kind: layer for layer, kind in enumerate(own)}
    return tuple(sorted({last[kind] for kind in shared if kind in last}))


def state_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of the slots for states that are set aside, one a request and one more."""
    model = vllm_config.model_config
    if not model.is_hybrid:
        return 0
    found, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    model_class: Any = found
    shapes = model_class.get_mamba_state_shape_from_config(vllm_config)
    dtypes = model_class.get_mamba_state_dtype_from_config(vllm_config)
    of_layer: int = sum(
        math.prod(shape) * get_dtype_size(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    slots = vllm_config.scheduler_config.max_num_seqs + 1
    return slots * state_layers(vllm_config) * of_layer


def state_layers(vllm_config: VllmConfig) -> int:
    """Count the layers that keep a state, beside a cache of tokens or instead."""
    if not vllm_config.model_config.is_hybrid:
        return 0
    return sum(kind not in _STATELESS for kind in _all_kinds(vllm_config))


def _kinds(vllm_config: VllmConfig) -> list[str]:
    """Name the kind of each layer that caches tokens: others keep states at most."""
    kinds = _all_kinds(vllm_config)
    is_hybrid = vllm_config.model_config.is_hybrid
    return [kind for kind in kinds if kind in _KNOWN] if is_hybrid else kinds


def _all_kinds(vllm_config: VllmConfig) -> list[str]:
    model = vllm_config.model_config
    text = model.hf_text_config
    layers = model.get_num_layers(vllm_config.parallel_config)
    kinds = getattr(text, "layers_block_type", None)
    kinds = kinds or getattr(text, "layer_types", None)
    if kinds is None:
        # Qwen2-like configs name a window that `use_sliding_window` switches off.
        slides = model.get_sliding_window() and getattr(text, _SLIDES, True)
        return ["sliding_attention" if slides else "full_attention"] * layers
    return list(kinds[: layers - _num_shared(model)])


def _shared_kinds(vllm_config: VllmConfig) -> list[str]:
    """Name the kind of each layer that reads an earlier one's cache."""
    model = vllm_config.model_config
    shared = _num_shared(model)
    kinds = getattr(model.hf_text_config, "layer_types", None) or []
    return list(kinds[len(kinds) - shared :]) if shared else []


def _num_shared(model: ModelConfig) -> int:
    return getattr(model.hf_text_config, "num_kv_shared_layers", None) or 0


def _local_layers(model: ModelConfig, kinds: list[str]) -> tuple[Local | None, ...]:
    """What the queries of each layer see; empty if all of them see everything."""
    text, longest = model.hf_text_config, model.max_model_len
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    if getattr(text, "model_type", None) in _SEES_ONE_MORE and window:
        window += 1
    by_kind = {
        "sliding_attention": Local(window) if window else None,
        "chunked_attention": Local(chunk, is_chunk=True) if chunk else None,
    }
    local = tuple(_reached(by_kind.get(kind), longest) for kind in kinds)
    return local if any(local) else ()


def _reached(local: Local | None, longest: int) -> Local | None:
    """What no request outgrows is everything."""
    return local if local and local.tokens < longest else None


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


def check_model(vllm_config: VllmConfig) -> None:
    """Refuse, by its configuration alone, a model that cannot be paged per head.

    Raises:
        UserError: names the model, what it has and the way out.
    """
    model = vllm_config.model_config
    kinds = {
        "MLA": model.use_mla,
        "Mamba (and no attention)": model.is_attention_free,
        "encoder-decoder": model.is_encoder_decoder,
        "pooling": model.runner_type != "generate",
    }
    for kind, present in kinds.items():
        if present:
            raise _unsupported(model.model, kind)
    _check_numbers(vllm_config)
    for kind in _kinds(vllm_config):
        if kind not in _KNOWN:
            raise _unsupported(model.model, kind)
    if _unequal_heads(vllm_config) and hardware.uses_triton():
        raise _unsupported(model.model, "on GPUs, unequal")
    why = cannot_share(vllm_config)
    if why and vllm_config.cache_config.enable_prefix_caching:
        raise UserError(f"--enable-prefix-caching: {why}; leave the flag out")


def cannot_share(vllm_config: VllmConfig) -> str:
    """Say what keeps requests to a model from sharing prefixes, if anything does."""
    model = vllm_config.model_config
    if model.is_hybrid:
        return (
            f"MODEL {model.model} keeps states beside its cache, which nobody can "
            "start with"
        )
    if _unequal_heads(vllm_config):
        return (
            f"layers of {Path(model.model).name} have heads of unequal number or size, "
            "which cannot have it yet"
        )
    return ""


def _check_numbers(vllm_config: VllmConfig) -> None:
    """Refuse numbers of a configuration that no layers can have.

    Raises:
        UserError: names the entry, or the heads that do not fit.
    """
    model = vllm_config.model_config
    shared, layers = (
        _num_shared(model),
        model.get_num_layers(vllm_config.parallel_config),
    )
    impossible = {
        "sliding_window": (model.get_sliding_window() or 0) < 0,
        "attention_chunk_size": (model.attention_chunk_size or 0) < 0,
        "num_kv_shared_layers": not 0 <= shared < layers,
    }
    for entry, is_so in impossible.items():
        if is_so:
            value = getattr(model.hf_text_config, entry)
            raise UserError(
                f"MODEL {model.model}: its configuration has {entry}={value}, which no "
                "layers can have; mend its config.json"
            )
    if not _kinds(vllm_config):
        raise _unsupported(model.model, "no attention")
    by_layer = _unequal_heads(vllm_config)
    largest = max((size for _, size in by_layer), default=0)
    for heads, size in by_layer:
        if heads < 1 or size < 1 or largest % size:
            raise UserError(
                f"MODEL {model.model}: {heads} heads of {size} numbers do not fit into "
                f"pages for heads of {largest}; {_WAY_OUT}"
            )


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
        keeps_states = isinstance(layer, MambaBase)
        if is_other and not keeps_states and layer_name not in layers:
            raise _unsupported(name, type(layer).__name__)
    if not layers:
        raise _unsupported(name, "no attention")
    for layer in layers.values():
        if layer.attn_type != AttentionType.DECODER:
            raise _unsupported(
                name, f"{AttentionType(layer.attn_type).value} attention"
            )
    if any(v.head_size != v.head_size_v for v in layers.values()):
        raise _unsupported(name, "unequal key and value")
    own = [layers[name] for name in _with_own_cache(layers)]
    _check_shapes(vllm_config, own)
    _check_local(vllm_config, own)
    _check_shared(vllm_config, layers)


def _check_shapes(vllm_config: VllmConfig, layers: Sequence[Attention]) -> None:
    """Refuse layers that are not those for which pages were planned."""
    model = model_shape_of(vllm_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    alike = (model.num_kv_heads, model.head_size)
    planned = [
        (model.num_query_heads // ranks, max(heads // ranks, 1), size)
        for heads, size in model.layer_heads or (alike,) * model.num_layers
    ]
    found = [(one.num_heads, one.num_kv_heads, one.head_size) for one in layers]
    if found != planned:
        raise UserError(
            f"MODEL {vllm_config.model_config.model}: its configuration tells of "
            f"{_in_words(planned)}, but it has {_in_words(found)}; {_WAY_OUT}"
        )


def _in_words(layers: Sequence[tuple[int, int, int]]) -> str:
    names = "query heads", "KV heads", "numbers a head"
    kinds = Counter(layers)
    return " and ".join(
        f"{count} layers, "
        + ", ".join(f"{n} {name}" for n, name in zip(one, names, strict=True))
        for one, count in kinds.items()
    )


def _check_local(vllm_config: VllmConfig, layers: Sequence[Attention]) -> None:
    """Refuse layers that see something else than what was planned."""
    model, longest = vllm_config.model_config, vllm_config.model_config.max_model_len
    planned = model_shape_of(vllm_config).local_by_layer
    for place, (layer, told) in enumerate(zip(layers, planned, strict=True)):
        chunk = getattr(layer, "attention_chunk_size", None)
        sees = Local(chunk, is_chunk=True) if chunk else None
        if layer.sliding_window is not None:
            sees = Local(layer.sliding_window)
        if _reached(sees, longest) != told:
            raise UserError(
                f"MODEL {model.model}: by its configuration layer {place} sees "
                f"{told or 'everything'}, but it sees {sees or 'everything'}; "
                f"{_WAY_OUT}"
            )


def _with_own_cache(layers: Mapping[str, Attention]) -> list[str]:
    return [
        name
        for name, layer in layers.items()
        if layer.kv_sharing_target_layer_name is None
    ]


def _check_shared(vllm_config: VllmConfig, layers: Mapping[str, Attention]) -> None:
    """Refuse layers that read another's cache than was planned, or see it otherwise."""
    own, found = _with_own_cache(layers), set()
    for place, layer in enumerate(layers.values()):
        target = layer.kv_sharing_target_layer_name
        if target is None:
            continue
        if layer.sliding_window != layers[target].sliding_window:
            raise UserError(
                f"MODEL {vllm_config.model_config.model}: layer {place} sees another "
                f"window than layer {own.index(target)}, whose cache it reads; "
                f"{_WAY_OUT}"
            )
        found.add(own.index(target))
    planned = model_shape_of(vllm_config).reread
    if found != set(planned):
        raise UserError(
            f"MODEL {vllm_config.model_config.model}: by its configuration layers "
            f"{[*planned]} are read by others, but {sorted(found)} are; {_WAY_OUT}"
        )


def check_states(vllm_config: VllmConfig, found: int) -> None:
    """Refuse states that take other than the ``found`` bytes that were planned."""
    planned = state_bytes(vllm_config)
    if found != planned:
        raise UserError(
            f"MODEL {vllm_config.model_config.model}: its configuration tells of "
            f"states of {planned} bytes, but they have {found}; {_WAY_OUT}"
        )


def _unsupported(model: str, kind: str) -> UserError:
    return UserError(
        f"MODEL {model}: has {kind} layers, which kvserve cannot page per head; "
        f"{_WAY_OUT}"
    )
