# SPDX-License-Identifier: Apache-2.0
"""The worker hook: one pool for all layers, and the batch for the row builder.

Named to vLLM by ``--worker-cls``. A worker of this class serves a policy; any other
worker in the same process is stock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from kvserve.dense_plan import DenseRule
from kvserve.engine.attention import HeadPagedAttention
from kvserve.engine.backend import HeadPagedMetadataBuilder
from kvserve.engine.dense_attention import DensePagedAttention
from kvserve.engine.dense_backend import DenseMetadataBuilder
from kvserve.engine.dense_tables import DenseTables
from kvserve.engine.spec import DensePagedSpec, HeadPagedSpec, SharedPagedSpec
from kvserve.engine.support import Rule, check_layers, rule_of, scratch_of
from kvserve.engine.usage import WorkerUsage

_STREAMING = "kvserve.engine.backend.HeadPagedBackend"
_DENSE = "kvserve.engine.dense_backend.DensePagedBackend"


@contextmanager
def _attention_backend(path: str) -> Iterator[None]:
    """Let layers built inside resolve to our backend, and only those."""
    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def _lengths(request: NewRequestData) -> tuple[int, int]:
    """Tokens of a request's prompt, and of the longest reply it may get."""
    ids, embeds = request.prompt_token_ids, request.prompt_embeds
    prompt_tokens = len(ids if ids is not None else cast(Sized, embeds))
    sampling = request.sampling_params
    assert sampling is not None, "check_model refuses pooling"
    return prompt_tokens, sampling.max_tokens or 0


class HeadPagedCPUWorker(CPUWorker):
    """A CPU worker whose KV cache is a pool of head pages under a policy."""

    _builder: HeadPagedMetadataBuilder
    _rule: Rule

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self._rule = rule_of(self.vllm_config)
        is_dense = isinstance(self._rule, DenseRule)
        with _attention_backend(_DENSE if is_dense else _STREAMING):
            super().load_model(*args, **kwargs)
        layers = self._attention_layers()
        check_layers(self.vllm_config, layers)
        first = next(iter(layers))
        for name, layer in layers.items():
            if name != first:
                # Sharing is how layers bind to one tensor and one metadata object.
                layer.kv_sharing_target_layer_name = first

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        stock = super().get_kv_cache_spec()
        first, spec = next(iter(stock.items()))
        layer, rule = self._attention_layers()[first], self._rule
        page: dict[str, Any] = {
            "rule": rule,
            "num_scratch_pages": scratch_of(self.vllm_config, rule),
            "block_size": spec.block_size,
            "num_kv_heads": 1,
            "head_size": layer.head_size,
            "dtype": layer.kv_cache_torch_dtype,
        }
        if isinstance(rule, DenseRule):
            return {first: DensePagedSpec(**page, plan=rule.full)}
        kind = SharedPagedSpec if rule.is_shared else HeadPagedSpec
        return {first: kind(**page, plan=rule.longest)}

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        (group,) = self.model_runner.attn_groups[0]
        self._builder = cast(HeadPagedMetadataBuilder, group.get_metadata_builder())
        self._builder.attach(self.model_runner.input_batch)
        layers = self._attention_layers().values()
        for index, layer in enumerate(layers):
            cast(HeadPagedAttention, layer.impl).bind(self._builder.kernels, index)
        if isinstance(self._rule, DenseRule):
            builder = cast(DenseMetadataBuilder, self._builder)
            state = builder.make_state(next(iter(layers)).kv_cache)
            for layer in layers:
                impl = cast(DensePagedAttention, layer.impl)
                impl.learn(self._rule.policy, self._rule.model, state)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        new = scheduler_output.scheduled_new_reqs
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        tables = self._builder.tables
        if new or resumed:
            tables.forget([*(request.req_id for request in new), *resumed])
        tables.finish(list(scheduler_output.finished_req_ids))
        for request in new:
            tables.expect(request.req_id, *_lengths(request))
        output = super().execute_model(scheduler_output)
        if isinstance(self._builder, DenseMetadataBuilder):
            self._builder.settle()
        return output

    def usage(self) -> WorkerUsage:
        """Report what only the worker knows; the scheduler process asks for it."""
        clock, tables = self._builder.clock, self._builder.tables
        heads = tables.lane_of_head if isinstance(tables, DenseTables) else {}
        return WorkerUsage(clock.selection, clock.compaction, heads)

    def _attention_layers(self) -> dict[str, Attention]:
        return get_layers_from_vllm_config(self.vllm_config, Attention)
