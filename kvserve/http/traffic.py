# SPDX-License-Identifier: Apache-2.0
"""vLLM's own counters, read where Prometheus reads them: over all API processes."""

from __future__ import annotations

import os
from collections import defaultdict

from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import get_prometheus_registry

from kvserve.http.models import Latency, Traffic

_COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "requests_finished": "vllm:request_success_total",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}
_LATENCIES = {
    "time_to_first_token": "vllm:time_to_first_token_seconds",
    "inter_token_latency": "vllm:inter_token_latency_seconds",
}
_NAMES = frozenset(_COUNTERS.values()) | {
    f"{name}_{part}" for name in _LATENCIES.values() for part in ("sum", "count")
}


def read_traffic() -> Traffic | None:
    """Add the counters up over engines; ``None`` if vLLM keeps none."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        metrics = get_prometheus_registry().collect()
    else:
        metrics = REGISTRY.restricted_registry(_NAMES).collect()
    totals: dict[str, float] = defaultdict(float)
    for metric in metrics:
        for sample in metric.samples:
            if sample.name in _NAMES:
                totals[sample.name] += sample.value
    if _COUNTERS["generation_tokens"] not in totals:
        return None
    counters = {field: totals[name] for field, name in _COUNTERS.items()}
    latencies = {
        field: Latency(sum=totals[f"{name}_sum"], count=int(totals[f"{name}_count"]))
        for field, name in _LATENCIES.items()
    }
    return Traffic.model_validate({**counters, **latencies})
