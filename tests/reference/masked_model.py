# SPDX-License-Identifier: Apache-2.0
"""A Llama in plain float32 PyTorch whose every KV head has its own visibility mask.

Slow on purpose: the whole sequence at once, dense masks, one KV head after the other.
Knows nothing of pages, lanes, chunks or slots, only of the rule in
``docs/architecture.md``: a query in block ``i`` of a bounded head sees the sink blocks,
the head's shards and blocks ``i - w + 1 .. i``, causally; a full head sees everything.
In a layer with a window of its own a query sees the last so many tokens, in one of
chunks those of its own chunk, whatever its heads keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from policies.base import HeadBudget, Local
from tests.reference.thinning import Judge, is_thinned, kept_tokens, visible_thinned

Budgets = Sequence[Sequence[HeadBudget]]


def visible(budget: HeadBudget, tokens: int, page_size: int) -> Tensor:
    """Tell which keys each query of one head sees: bool ``[queries, keys]``."""
    query = torch.arange(tokens)[:, None]
    key = torch.arange(tokens)[None, :]
    causal = key <= query
    if budget.recent is None:
        return causal
    sink_blocks = whole_blocks(budget.sinks, page_size)
    window_blocks = whole_blocks(budget.recent, page_size)
    query_block, key_block = query // page_size, key // page_size
    is_sink = key_block < sink_blocks
    is_recent = key_block > query_block - window_blocks
    places = torch.tensor(sorted(budget.shards), dtype=torch.long)
    is_shard = torch.isin((key_block - sink_blocks) % budget.stride, places)
    return causal & (is_sink | is_recent | is_shard)


def within(local: Local, tokens: int) -> Tensor:
    """Tell which keys the queries of a layer with a window or chunks see."""
    query = torch.arange(tokens)[:, None]
    key = torch.arange(tokens)[None, :]
    if local.is_chunk:
        return (key <= query) & (key // local.tokens == query // local.tokens)
    return (key <= query) & (key > query - local.tokens)


def whole_blocks(tokens: int, page_size: int) -> int:
    """Round tokens up to blocks."""
    blocks = tokens // page_size
    return blocks if blocks * page_size == tokens else blocks + 1


@dataclass(frozen=True)
class LlamaShape:
    """What the forward pass reads from a Hugging Face ``config.json``.

    ``local`` says what each layer sees, ``None`` being all. ``soft_cap`` is 0 if there
    is none, and ``slopes`` are ALiBi's of each query head or empty.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float
    norm_eps: float
    local: tuple[Local | None, ...]
    soft_cap: float
    slopes: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LlamaShape:
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            num_query_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", heads),
            head_size=config.get("head_dim", config["hidden_size"] // heads),
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            local=tuple(
                _local(kind, config)
                for kind in config.get("layer_types")
                or ["full_attention"] * config["num_hidden_layers"]
            ),
            soft_cap=config.get("soft_cap") or 0.0,
            slopes=tuple(config.get("alibi_slopes") or ()),
        )


def _local(kind: str, config: dict[str, Any]) -> Local | None:
    if kind == "sliding_attention":
        return Local(config["sliding_window"])
    if kind == "chunked_attention":
        return Local(config["attention_chunk_size"], is_chunk=True)
    return None


class MaskedLlama:
    """The model in a directory of ``config.json`` and ``*.safetensors``.

    ``cached`` is what a cache makes of keys and values, ``[tokens, heads, d]``.
    """

    def __init__(
        self, path: Path | str, cached: Callable[[Tensor], Tensor] = lambda whole: whole
    ) -> None:
        directory = Path(path)
        self._cached = cached
        self.shape = LlamaShape.from_config(
            json.loads((directory / "config.json").read_text())
        )
        self._weights: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            for name, weight in load_file(file).items():
                self._weights[name] = weight.to(torch.float32)

    def forget_sinks(self) -> None:
        """Leave them out from now on."""
        for name in [name for name in self._weights if name.endswith(".sinks")]:
            del self._weights[name]

    @torch.no_grad()
    def logits(
        self,
        tokens: Sequence[int],
        budgets: Budgets,
        page_size: int,
        first: int = 0,
        judge: Judge | None = None,
        spared: Collection[int] = (),
    ) -> Tensor:
        """Return the logits after each token from ``first`` on, ``[n - first, V]``.

        Args:
            tokens: ``n`` token ids.
            budgets: what each head keeps, ``[num_layers][num_kv_heads]``.
            page_size: tokens of a block.
            judge: scores what leaves the windows of heads that are thinned.
            spared: positions of tokens that these heads keep before others.
        """
        embeddings = self._weights["model.embed_tokens.weight"]
        hidden = embedding(torch.tensor(tokens), embeddings)
        thins = judge and (judge, spared)
        for layer in range(self.shape.num_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{name}.input_layernorm")
            hidden = hidden + self._attention(
                normed, f"{name}.self_attn", budgets[layer], page_size, layer, thins
            )
            normed = self._norm(hidden, f"{name}.post_attention_layernorm")
            hidden = hidden + self._mlp(normed, f"{name}.mlp")
        hidden = self._norm(hidden[first:], "model.norm")
        return linear(hidden, self._weights.get("lm_head.weight", embeddings))

    def _attention(
        self,
        hidden: Tensor,
        name: str,
        budgets: Sequence[HeadBudget],
        page_size: int,
        layer: int,
        thins: tuple[Judge, Collection[int]] | None,
    ) -> Tensor:
        shape, tokens = self.shape, len(hidden)
        query = self._project(hidden, f"{name}.q_proj").view(
            tokens, shape.num_query_heads, shape.head_size
        )
        key, value = (
            self._project(hidden, f"{name}.{which}_proj").view(
                tokens, shape.num_kv_heads, shape.head_size
            )
            for which in ("k", "v")
        )
        projected = key
        query, key = self._rotate(query), self._cached(self._rotate(key))
        value = self._cached(value)
        group = shape.num_query_heads // shape.num_kv_heads
        outputs = []
        for head in range(shape.num_query_heads):
            kv_head = head // group
            budget = budgets[kv_head]
            mask = self._mask(layer, budget, tokens, page_size)
            if thins is not None and is_thinned(budget):
                judge, spared = thins
                known = judge, projected, value, page_size, spared
                kept = kept_tokens(layer, kv_head, budget, *known)
                mask = visible_thinned(budget, kept, page_size)
            places = torch.arange(tokens)
            weights = self._weigh(
                name, head, query[:, head], key[:, kv_head], places, places, mask
            )
            outputs.append(weights @ value[:, kv_head])
        return self._project(torch.cat(outputs, dim=-1), f"{name}.o_proj")

    def _mask(
        self, layer: int, budget: HeadBudget, tokens: int, page_size: int
    ) -> Tensor:
        local = self.shape.local[layer]
        if local is not None:
            return within(local, tokens)
        return visible(budget, tokens, page_size)

    def _weigh(
        self,
        name: str,
        head: int,
        query: Tensor,
        key: Tensor,
        own: Tensor,
        places: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Softmax of one query head, ``[n, m]``.

        Args:
            name: of the layer's attention.
            query: ``[n, D]`` at positions ``own [n]``.
            key: ``[m, D]`` at positions ``places [m]``.
            mask: which keys each query sees, ``[n, m]``.
        """
        shape = self.shape
        logits = query @ key.T / shape.head_size**0.5
        if shape.soft_cap:
            logits = shape.soft_cap * torch.tanh(logits / shape.soft_cap)
        if shape.slopes:
            logits = logits - shape.slopes[head] * (own[:, None] - places[None, :])
        logits = logits.masked_fill(~mask, float("-inf"))
        sinks = self._weights.get(f"{name}.sinks")
        if sinks is None:
            return logits.softmax(dim=-1)
        # As if there were one more key, whose value is 0.
        one_more = sinks[head].expand(len(query), 1)
        return torch.cat([logits, one_more], dim=-1).softmax(dim=-1)[:, :-1]

    def _rotate(self, states: Tensor) -> Tensor:
        """Apply RoPE to ``[tokens, heads, head_size]``, in the two-halves layout."""
        size = self.shape.head_size
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        frequencies = 1.0 / self.shape.rope_theta**exponents
        angles = torch.outer(torch.arange(len(states)).float(), frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right = states.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _mlp(self, hidden: Tensor, name: str) -> Tensor:
        gate = silu(self._project(hidden, f"{name}.gate_proj"))
        return self._project(
            gate * self._project(hidden, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        variance = hidden.square().mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(variance + self.shape.norm_eps)
        return hidden * scale * self._weights[f"{name}.weight"]

    def _project(self, hidden: Tensor, name: str) -> Tensor:
        return linear(hidden, self._weights[f"{name}.weight"])
