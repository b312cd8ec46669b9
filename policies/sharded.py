# SPDX-License-Identifier: Apache-2.0
"""Every head keeps the last blocks and its own shard of all earlier ones.

Source: S2-Attention (arXiv 2407.17678) and its DKernel code: of every ``stride`` blocks
a head keeps those with ``(block + head * step + offset) % stride == 0``, so that the
heads of a layer see the whole context between them. A pattern to train a model with,
not to put on one that was trained without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvserve.errors import UserError
from policies.base import (
    FULL,
    Capabilities,
    HeadBudget,
    ModelShape,
    StreamingPolicy,
    parameter,
)
from policies.scoring import choice

_DECLARED = {
    "blocksparse_block_size": "block",
    "blocksparse_num_local_blocks": "local_blocks",
    "blocksparse_vert_stride": "stride",
    "blocksparse_homo_head_pattern": "homo_head",
    "dense_attention_every_n_layers": "dense_every",
}
"""Entries of a model's configuration, and the parameters that must agree with them."""


@dataclass(frozen=True)
class Sharded(StreamingPolicy):
    """Every head keeps the last blocks and one of every ``stride`` earlier ones."""

    name: ClassVar[str] = "sharded"
    paper: ClassVar[str] = "S2-Attention, arXiv 2407.17678"
    capabilities: ClassVar[Capabilities] = Capabilities(
        prefill="streaming",
        position_only=True,
        prefix_cacheable=True,
        cuda_graph_safe=True,
        tensor_parallel_exact=True,
    )

    block: int = parameter(64, "tokens of a block, and of a page", minimum=32)
    local_blocks: int = parameter(
        16, "last blocks that every head sees, the open one counted", minimum=1
    )
    stride: int = parameter(
        8, "of so many blocks a head keeps one for good", minimum=1, maximum=64
    )
    offset: int = parameter(
        1, "shift of all shards: 1 as in Phi-3-small, 0 as in DKernel", minimum=0
    )
    step: int | None = parameter(
        None,
        "shift from one head to the next; default: stride / heads, at least 1",
        minimum=0,
    )
    homo_head: bool = parameter(False, "all heads keep the same shard: step 0")
    pattern: str | None = parameter(
        None,
        "heads that have a shard of their own: kv, or query, where a KV head keeps "
        "and shows what any query head of its group was trained to see; default: "
        "query for a model that declares shards, else kv",
    )
    dense_every: int | None = parameter(
        None, "of every so many layers the last keeps everything", minimum=1
    )
    dense_heads: int = parameter(
        0, "last heads of each layer that keep everything", minimum=0
    )
    insist: bool = parameter(
        False, "serve a model whose configuration declares no such pattern"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            choice(self.name, "pattern", self.pattern, "kv", "query")

    @property
    def page_size(self) -> int:
        return self.block

    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        self._check(model)
        sparse = tuple(self._budget(head, model) for head in range(model.num_kv_heads))
        dense = (FULL,) * model.num_kv_heads
        every = self.dense_every or model.num_layers + 1
        return tuple(
            dense if (layer + 1) % every == 0 else sparse
            for layer in range(model.num_layers)
        )

    def remark(self, model: ModelShape) -> str:
        if model.pattern:
            return ""
        return (
            f"warning: {model.name} was not trained with shards, and will lose track "
            "of its context"
        )

    def _budget(self, kv_head: int, model: ModelShape) -> HeadBudget:
        pattern = self.pattern or ("query" if model.pattern else "kv")
        group = model.group_size if pattern == "query" else 1
        heads = model.num_kv_heads * group
        own = range(kv_head * group, (kv_head + 1) * group)
        if own[-1] >= heads - self.dense_heads:
            return FULL
        step = max(1, self.stride // heads) if self.step is None else self.step
        shards = frozenset(
            -(head * (0 if self.homo_head else step) + self.offset) % self.stride
            for head in own
        )
        recent = self.local_blocks * self.block
        return HeadBudget(0, recent, self.stride, shards)

    def _check(self, model: ModelShape) -> None:
        """Refuse a model that was trained without this pattern, or with another."""
        declared: dict[str, Any] = dict(model.pattern)
        if not declared and not self.insist:
            raise UserError(
                f"--policy sharded: {model.name} declares no block-sparse pattern, and "
                "shards ruin a model that was not trained with them; pass "
                "`--policy-arg insist=true` to see it, or choose `--policy retrieval`"
            )
        for entry, name in _DECLARED.items():
            value = getattr(self, name)
            if declared.get(entry, value) != value and not self.insist:
                raise UserError(
                    f"--policy-arg {name}={value}: {model.name} was trained with "
                    f"{entry} = {declared[entry]}; pass `{name}={declared[entry]}`"
                )
