# SPDX-License-Identifier: Apache-2.0
"""Attention over head pages beside vLLM's FlashAttention 3 and Triton attention.

Microseconds of one layer: decode at 32k with everything and with an eighth kept, and
prefill of 8k and 32k, whole and with bounded heads. The peers read vLLM's own pages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from scripts.gpu.stages.common import Stage, stage_main

SHAPES = {"llama-3.1-8b, qwen3-8b": (32, 8), "qwen3-30b-a3b": (32, 4)}
"""Query and KV heads; all have heads of 128."""
BATCHES = (1, 8, 32, 64)
CONTEXT, KEPT, PREFILLS = 32768, 0.125, (8192, 32768)
PAGE, STOCK_PAGE = 32, 16
SEGMENTS, LEAST_GRID = 16, 128
"""As vLLM's Triton backend splits decode (``triton_attn.py``)."""

Run = Callable[[], object]


def peers(requests: int, queries: int, context: int) -> dict[str, Run]:
    """Stock vLLM's attention over ``requests`` of ``context`` tokens, all kept."""
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from benchmarks import gpu_rows as rows

    on: dict[str, Any] = {"dtype": rows.DTYPE, "device": rows.DEVICE}
    whole: dict[str, Any] = {"dtype": torch.int32, "device": rows.DEVICE}
    width = context // STOCK_PAGE
    shape = requests * width, rows.KV_HEADS, STOCK_PAGE, 2 * rows.HEAD_SIZE
    key, value = torch.randn(shape, **on).transpose(1, 2).split(rows.HEAD_SIZE, -1)
    query = torch.randn(requests * queries, rows.QUERY_HEADS, rows.HEAD_SIZE, **on)
    table = torch.randperm(requests * width, **whole).view(requests, width)
    common: dict[str, Any] = {
        "q": query,
        "k": key,
        "v": value,
        "out": torch.empty_like(query),
        "cu_seqlens_q": torch.arange(requests + 1, **whole) * queries,
        "max_seqlen_q": queries,
        "seqused_k": torch.full((requests,), context, **whole),
        "max_seqlen_k": context,
        "softmax_scale": rows.SCALE,
        "causal": True,
        "block_table": table,
    }
    most = LEAST_GRID // rows.KV_HEADS
    part = most, rows.QUERY_HEADS, SEGMENTS
    real: dict[str, Any] = {"dtype": torch.float32, "device": rows.DEVICE}
    split = {
        "seq_threshold_3D": most,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*part, rows.HEAD_SIZE, **real),
        "softmax_segm_max": torch.empty(part, **real),
        "softmax_segm_expsum": torch.empty(part, **real),
    }
    scales = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    return {
        "fa3": lambda: flash_attn_varlen_func(**common, fa_version=3),
        "vllm_triton": lambda: unified_attention(
            **common, **split, **scales, window_size=(-1, -1), softcap=0.0
        ),
    }


def ours(requests: int, context: int, kept: float) -> dict[str, Run]:
    from benchmarks import gpu_rows as rows

    part = round(kept * context)
    return {
        "all_kept": rows.decode_rows(requests, context, context, 1, PAGE).attention(),
        "part_kept": rows.decode_rows(requests, context, part, 0, PAGE).attention(),
    }


def times(stage: Stage, label: str, make: Callable[[], dict[str, Run]]) -> None:
    """Measure, one way after the other, and note microseconds."""
    from benchmarks import gpu_rows as rows

    found: dict[str, float] = {}
    with stage.attempt(label):
        for name, run in make().items():
            with stage.attempt(f"{label}, {name}"):
                found[name] = round(rows.measure(run).median * 1e3, 1)
        stage.note(**{label: found})


def run(stage: Stage) -> None:
    if not stage.on_gpu:  # read when Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks import gpu_rows as rows

    shapes, batches, context, prefills = SHAPES, BATCHES, CONTEXT, PREFILLS
    if not stage.on_gpu:  # Triton's interpreter; FlashAttention has none
        small(rows)
        shapes, batches, context, prefills = {"small": (4, 2)}, (1,), 256, (128,)
    for shape, (query_heads, kv_heads) in shapes.items():
        rows.QUERY_HEADS, rows.KV_HEADS = query_heads, kv_heads
        rows.GROUP = query_heads // kv_heads

        def decode(requests: int) -> dict[str, Run]:
            stock = peers(requests, 1, context) if stage.on_gpu else {}
            return ours(requests, context, KEPT) | stock

        def prefill(tokens: int) -> dict[str, Run]:
            bounded = rows.prefill_rows(tokens, tokens, True, PAGE)
            full = rows.prefill_rows(tokens, tokens, False, PAGE)
            own = {"full": full.attention(), "bounded": bounded.attention()}
            return own | (peers(1, tokens, tokens) if stage.on_gpu else {})

        for requests in batches:
            label = f"{shape}: decode {requests} x {context}"
            times(stage, label, lambda count=requests: decode(count))  # type: ignore[misc]
        for tokens in prefills:
            label = f"{shape}: prefill {tokens}"
            times(stage, label, lambda count=tokens: prefill(count))  # type: ignore[misc]


def small(rows: Any) -> None:
    """Let the benchmark run in Triton's interpreter."""
    import torch

    rows.DEVICE, rows.DTYPE, rows.HEAD_SIZE = "cpu", torch.float32, 32

    def once(run: Run) -> Any:
        start = time.perf_counter()
        run()
        milliseconds = (time.perf_counter() - start) * 1e3
        return rows.Timing(milliseconds, milliseconds, milliseconds)

    rows.measure = once


if __name__ == "__main__":
    stage_main(run)
