# SPDX-License-Identifier: Apache-2.0
"""The worker hook: one pool for all layers, and the batch for the row builder.

Named to vLLM by ``--worker-cls``. A worker of this class serves a policy; any other
worker in the same process is stock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from vllm.config import (
    AttentionConfig,
    CompilationMode,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from kvserve.engine.devices import hardware
from kvserve.engine.devices.cpu_adapters import own_adapters
from kvserve.engine.devices.cpu_operators import fused_gates
from kvserve.engine.scheduling.usage import WorkerUsage
from kvserve.engine.spec import HeadPagedSpec, SharedPagedSpec
from kvserve.engine.start.layers import check_layers, check_states
from kvserve.engine.start.options import check_platform
from kvserve.engine.start.support import (
    page_format_of,
    rule_of,
    scratch_of,
)
from kvserve.engine.worker.attention import HeadPagedAttention
from kvserve.engine.worker.backend import HeadPagedBackend, HeadPagedMetadataBuilder
from kvserve.engine.worker.compiled_code import (
    allow_compilation,
    let_compiled_code_load,
)
from kvserve.engine.worker.rotation import Rotation, rotation_of
from kvserve.engine.worker.states import States, state_specs
from kvserve.errors import UserError
from kvserve.kernels.huge_pages import use_huge_pages
from kvserve.plan.request_policies import rule_of_request
from kvserve.plan.rule import Rule
from kvserve.start_up import Phase, enter
from policies.thinning import ThinningPolicy

_BACKEND = "kvserve.engine.worker.backend.HeadPagedBackend"


@contextmanager
def _attention_backend(path: str, attention: AttentionConfig) -> Iterator[None]:
    """Let layers built inside resolve to our backend, and only those."""
    slot = hardware.attention_slot()
    asked = attention.backend, attention.backend_per_kind
    register_backend(slot, path)
    attention.backend, attention.backend_per_kind = slot, {}
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        slot.clear_override()
        attention.backend, attention.backend_per_kind = asked
        selector._cached_get_attn_backend.cache_clear()


def _lengths(request: NewRequestData) -> tuple[int, int]:
    """Tokens of a request's prompt, and of the longest reply it may get."""
    ids, embeds = request.prompt_token_ids, request.prompt_embeds
    prompt_tokens = len(ids if ids is not None else cast(Sized, embeds))
    sampling = request.sampling_params
    assert sampling is not None, "check_model refuses pooling"
    return prompt_tokens, sampling.max_tokens or 0


def _keep_on_host(block_tables: Any) -> None:
    """Spare the copies of page lists to the device, where nobody reads them.

    Kernels have tables of their own. vLLM would copy whole rows at every step, and a
    row has an entry for every head page of the longest request.
    """
    block_tables.commit_block_table = lambda _: None


class HeadPagedWorker(Worker):
    """A GPU worker whose KV cache is a pool of head pages under a policy."""

    _builder: HeadPagedMetadataBuilder
    _rule: Rule
    _states: States
    _page_size: int
    _cached_layers: list[str]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        enter(Phase.LOADING)
        check_platform()
        if self.use_v2_model_runner:
            raise UserError(
                "VLLM_USE_V2_MODEL_RUNNER: policies need vLLM's V1 model runner; set 0"
            )
        self._rule = rule_of(self.vllm_config)
        self._page_size = self.vllm_config.cache_config.block_size
        with _attention_backend(_BACKEND, self.vllm_config.attention_config):
            super().load_model(*args, **kwargs)
        layers = self._attention_layers()
        check_layers(self.vllm_config, layers)
        self._tell_lanes(layers)
        first = next(iter(layers))
        for name, layer in layers.items():
            # Layers that see chunks have made one of their own, which cuts requests.
            layer.attn_backend = HeadPagedBackend
            if name != first:
                # Sharing is how layers bind to one tensor and one metadata object.
                layer.kv_sharing_target_layer_name = first

    def _tell_lanes(self, layers: dict[str, Attention]) -> None:
        """Tell each layer which lanes it reads: its own, or those of an earlier one."""
        targets = {
            name: layer.kv_sharing_target_layer_name or name
            for name, layer in layers.items()
        }
        own = [name for name, target in targets.items() if name == target]
        self._cached_layers = own
        largest = self._rule.model.head_size
        last_reader = {target: name for name, target in targets.items()}
        for name, target in targets.items():
            impl = cast(HeadPagedAttention, layers[name].impl)
            is_last = last_reader[target] == name
            impl.read_lanes(own.index(target), name == target, is_last, largest)

    def _make_model_runner(self) -> GPUModelRunner:
        runner = super()._make_model_runner()
        # The runner asks itself when it profiles CUDA graphs, not the worker.
        stock = runner.get_kv_cache_spec

        def head_paged() -> dict[str, KVCacheSpec]:
            return self._head_paged(stock())

        runner.get_kv_cache_spec = head_paged  # type: ignore[method-assign]
        return runner

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        # vLLM makes pages as long as a state, if there are any, once layers are there.
        self.vllm_config.cache_config.block_size = self._page_size
        specs = super().get_kv_cache_spec()
        most_requests = self.vllm_config.scheduler_config.max_num_seqs
        self._states = States(state_specs(specs), most_requests)
        check_states(self.vllm_config, self._states.num_bytes)
        return self._head_paged(specs)

    def _head_paged(self, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
        """Replace the first layer's spec, which all layers share, by ours."""
        layers, rule = self._attention_layers(), self._rule
        first, spec = next(one for one in specs.items() if one[0] in layers)
        if isinstance(spec, HeadPagedSpec):
            return specs
        layer = layers[first]
        page: dict[str, Any] = {
            "rule": rule,
            "num_scratch_pages": scratch_of(self.vllm_config, rule),
            "block_size": self._page_size,
            "num_kv_heads": 1,
            "head_size": rule.model.head_size,
            "dtype": layer.kv_cache_torch_dtype,
        }
        if page_format := page_format_of(self.vllm_config):
            page["state_content_bytes"] = page_format.token_bytes(layer.head_size)
        kind = SharedPagedSpec if rule.is_shared else HeadPagedSpec
        return {first: kind(**page, plan=rule.largest)}

    def determine_available_memory(self) -> int:
        enter(Phase.WARMING)
        return super().determine_available_memory() - self._states.num_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        enter(Phase.OPENING)
        self._states.allocate_with(self.model_runner, self.vllm_config)
        super().initialize_from_config(self._states.added_to(kv_cache_config))
        (group,) = self.model_runner.attn_groups[0]
        self._builder = cast(HeadPagedMetadataBuilder, group.get_metadata_builder())
        self._builder.attach(self.model_runner.input_batch)
        _keep_on_host(self.model_runner.input_batch.block_table[0])
        layers = self._attention_layers().values()
        use_huge_pages(next(iter(layers)).kv_cache)
        self._builder.remember_tokens(next(iter(layers)).kv_cache)
        if isinstance(self._rule.policy, ThinningPolicy):
            self._builder.let_thin(self._rotations())

    def _rotations(self) -> list[Rotation | None]:
        """How keys are rotated, of each layer with a cache of its own."""
        model = self.model_runner.get_model()
        return [rotation_of(model, name) for name in self._cached_layers]

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        new = scheduler_output.scheduled_new_reqs
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        tables = self._builder.tables
        if new or resumed:
            tables.forget([*(request.req_id for request in new), *resumed])
        tables.finish(list(scheduler_output.finished_req_ids))
        for request in new:
            lengths = _lengths(request)
            named = rule_of_request(self._rule, request.sampling_params, sum(lengths))
            tables.expect(request.req_id, *lengths, named)
        self._states.schedule(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._builder.settle()
        return output

    def usage(self) -> WorkerUsage:
        """Report what only the worker knows; the scheduler process asks for it."""
        clock, tables = self._builder.clock, self._builder.tables
        heads = tables.settled.lane_of_head
        return WorkerUsage(clock.selection, clock.compaction, dict(heads))

    def _attention_layers(self) -> dict[str, Attention]:
        return get_layers_from_vllm_config(self.vllm_config, Attention)


class HeadPagedCPUWorker(HeadPagedWorker, CPUWorker):
    """The same on a CPU."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        eager = self.vllm_config.compilation_config.mode == CompilationMode.NONE
        allow_compilation(not eager)
        if not eager:
            let_compiled_code_load()
        with own_adapters(), fused_gates() if eager else nullcontext():
            super().load_model(*args, **kwargs)
