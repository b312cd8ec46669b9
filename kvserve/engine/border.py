# SPDX-License-Identifier: Apache-2.0
"""What kvserve takes from the inside of vLLM, symbol by symbol.

Below ``vllm.v1`` and ``vllm.model_executor`` nothing is promised to others. Each symbol
that we import from there is named here with what we rely on, and so is whatever we
replace elsewhere. ``tests/unit/engine/test_border.py`` holds this table against the
source of kvserve and against the vLLM that is installed: what an upgrade moves fails
there, by name. Of classes that we subclass it compares every method that we override.

An entry of ``has`` is an attribute, or a method or function with the parameters that we
pass or take, in their order: ``name(first, second)``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relied:
    """A symbol of vLLM, why we need it, and what it must have."""

    symbol: str
    why: str
    has: tuple[str, ...] = ()


_SCHEDULING = [
    Relied(
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager",
        "subclassed: gives a request the pages of its plan. vLLM calls "
        "remove_skipped_blocks before it counts or allocates, allocate_new_blocks once "
        "a step, cache_blocks after, and pop_blocks_for_free at the end",
        (
            *("req_to_blocks", "num_cached_block", "block_pool", "block_size"),
            *("kv_cache_spec", "kv_cache_group_id", "_null_block", "free(request_id)"),
            "_get_num_evictable_blocks(blocks)",
            "get_num_blocks_to_allocate"
            "(request_id, num_tokens, new_computed_blocks, total_computed_tokens)",
            "allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)",
            "remove_skipped_blocks"
            "(request_id, processed_computed_tokens, num_prompt_tokens)",
            "add_local_computed_blocks"
            "(request_id, new_computed_blocks, num_local_computed_tokens)",
            "cache_blocks(request, num_tokens, retention_interval)",
            *("find_longest_cache_hit()", "pop_blocks_for_free(request_id)"),
        ),
    ),
    Relied(
        "vllm.v1.core.block_pool.BlockPool",
        "its first blocks become scratch; its queue is replaced where pages are shared",
        (
            *("blocks", "null_block", "num_gpu_blocks", "free_block_queue"),
            *("get_new_blocks(num_blocks)", "free_blocks(ordered_blocks)"),
            *("touch(blocks)", "get_num_free_blocks()"),
        ),
    ),
    Relied(
        "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue",
        "subclassed: passed pages go out first. We take over its links",
        (
            *("num_free_blocks", "fake_free_list_head", "fake_free_list_tail"),
            *("popleft()", "popleft_n(n)", "remove(block)", "append_n(blocks)"),
            "get_all_free_blocks()",
        ),
    ),
    Relied(
        "vllm.v1.core.kv_cache_utils.KVCacheBlock",
        "a head page; the pool takes its hash when it gives it out again",
        (
            *("block_id", "ref_cnt", "is_null", "block_hash"),
            *("prev_free_block", "next_free_block", "reset_hash()"),
            "set_block_hash(block_hash, num_tokens)",
        ),
    ),
    Relied("vllm.v1.core.kv_cache_utils.BlockHash", "a type"),
    Relied("vllm.v1.core.kv_cache_utils.BlockHashList", "a type"),
    Relied("vllm.v1.core.kv_cache_utils.BlockHashWithGroupId", "a type"),
    Relied(
        "vllm.v1.core.kv_cache_utils.make_block_hash_with_group_id",
        "names the record of a block",
        ("(block_hash, group_id)",),
    ),
    Relied("vllm.v1.core.kv_cache_utils.get_block_hash", "reads it", ("(key)",)),
    Relied(
        "vllm.v1.core.sched.scheduler.Scheduler",
        "subclassed: tells the manager of requests, shares out budgets, cuts chunks. "
        "It asks "
        "_mamba_block_aligned_split for every cut if the switch is set, and preempts "
        "and frees through these methods alone",
        (
            *("kv_cache_manager", "requests", "need_mamba_block_aligned_split"),
            *("add_request(request)", "_free_blocks(request)"),
            *("_preempt_request(request)", "get_request_counts()"),
            "_mamba_block_aligned_split(request, num_new_tokens)",
            *("schedule(throttle_prefills)", "waiting", "running"),
            *("max_num_running_reqs", "num_spec_tokens"),
            "update_from_output(scheduler_output)",
        ),
    ),
    Relied(
        "vllm.v1.request.Request",
        "prompt, longest reply, salt and hashes of a request",
        (
            *("request_id", "num_prompt_tokens", "max_tokens", "sampling_params"),
            *("num_computed_tokens", "num_tokens", "cache_salt", "block_hashes"),
            "update_block_hashes()",
        ),
    ),
    Relied(
        "vllm.v1.engine.core.EngineCore",
        "answers calls that we add to the class, between steps",
        ("scheduler", "collective_rpc(method)"),
    ),
    Relied(
        "vllm.v1.engine.core.EngineCoreProc",
        "replaced: its target watches over its parent",
        ("run_engine_core",),
    ),
    Relied(
        "vllm.v1.utils",
        "replaced: as the target of API servers",
        ("run_api_server_worker_proc",),
    ),
    Relied(
        "vllm.v1.kv_cache_interface.AttentionSpec",
        "subclassed: a page of one head; decides how many blocks the pool has",
        (
            *("block_size", "num_kv_heads", "head_size", "dtype"),
            *("state_content_bytes", "page_size_bytes"),
            *("prefix_cacheable", "block_table_token_alignment"),
            "max_memory_usage_bytes(vllm_config)",
            "max_num_blocks_per_req(vllm_config, max_len)",
        ),
    ),
    Relied("vllm.v1.kv_cache_interface.KVCacheSpec", "a type"),
    Relied("vllm.v1.kv_cache_interface.KVCacheConfig", "a type"),
    Relied(
        "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry",
        "finds our manager by our spec",
        ("_ensure_registered()", "register(kvcache_spec_cls, manager_class)"),
    ),
]

_WORKER = [
    Relied(
        "vllm.v1.worker.gpu_worker.Worker",
        "subclassed: load_model, then get_kv_cache_spec, determine_available_memory, "
        "initialize_from_config, and execute_model for each step",
        (
            *("vllm_config", "model_runner", "use_v2_model_runner"),
            *("load_model()", "_make_model_runner()", "get_kv_cache_spec()"),
            *("determine_available_memory()", "execute_model(scheduler_output)"),
            "initialize_from_config(kv_cache_config)",
        ),
    ),
    Relied("vllm.v1.worker.cpu_worker.CPUWorker", "subclassed: the same on a CPU"),
    Relied(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "its batch has request ids and page lists; one-token requests come first",
        ("input_batch", "attn_groups", "get_kv_cache_spec()"),
    ),
    Relied(
        "vllm.v1.core.sched.output.SchedulerOutput",
        "tells of new, resumed and finished requests",
        (
            *("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids"),
            "scheduled_spec_decode_tokens",
        ),
    ),
    Relied(
        "vllm.v1.core.sched.output.NewRequestData",
        "its prompt and longest reply",
        ("req_id", "prompt_token_ids", "prompt_embeds", "sampling_params"),
    ),
    Relied(
        "vllm.v1.attention.selector",
        "its cache would answer with another engine's backend",
        ("_cached_get_attn_backend",),
    ),
    Relied(
        "vllm.v1.attention.backends.registry.register_backend",
        "lets layers resolve to our backend while a model loads",
        ("(backend, class_path)",),
    ),
    Relied(
        "vllm.v1.attention.backends.registry.AttentionBackendEnum",
        "the backend that ours stands in for",
        ("CUSTOM", "CPU_ATTN", "clear_override()"),
    ),
    Relied(
        "vllm.v1.attention.backend.AttentionBackend",
        "subclassed: what layers of a policy's engine resolve to",
        (
            *("supported_dtypes", "supported_kv_cache_dtypes"),
            *("forward_includes_kv_cache_update", "get_name()", "get_impl_cls()"),
            *("get_builder_cls()", "get_supported_kernel_block_sizes()"),
            *(
                "supports_compute_capability(capability)",
                "supported_kv_cache_layouts()",
            ),
        ),
    ),
    Relied(
        "vllm.v1.attention.backend.AttentionMetadataBuilder",
        "subclassed: builds a step's rows once for all layers",
        (
            "_init_reorder_batch_threshold"
            "(reorder_batch_threshold, supports_spec_as_decode)",
            *("kv_cache_spec", "build_for_cudagraph_capture(common_attn_metadata)"),
            "build(common_prefix_len, common_attn_metadata, fast_build)",
            "get_cudagraph_support(vllm_config, kv_cache_spec)",
        ),
    ),
    Relied(
        "vllm.v1.attention.backend.AttentionImpl",
        "subclassed: a layer",
        ("forward(layer, query, key, value, kv_cache, attn_metadata, output)",),
    ),
    Relied("vllm.v1.attention.backend.AttentionMetadata", "subclassed: a step's rows"),
    Relied("vllm.v1.attention.backend.AttentionLayer", "a type"),
    Relied(
        "vllm.v1.attention.backend.AttentionCGSupport",
        "which steps graphs may replay",
        ("NEVER", "UNIFORM_SINGLE_TOKEN_DECODE"),
    ),
    Relied("vllm.v1.attention.backend.AttentionType", "a kind", ("DECODER",)),
    Relied("vllm.v1.attention.backend.MultipleOf", "of tokens of a page"),
    Relied(
        "vllm.v1.attention.backend.CommonAttentionMetadata",
        "lengths on the host, exact where steps are planned one at a time",
        (
            *("num_reqs", "num_actual_tokens", "query_start_loc_cpu"),
            "seq_lens_cpu_upper_bound",
        ),
    ),
    Relied("vllm.v1.kv_cache_layout.KVCacheLayout", "how pages lie", ("LBHNC",)),
    Relied(
        "vllm.v1.attention.backends.cpu_attn._get_attn_isa",
        "how vLLM's CPU kernels lay out a page",
        ("(dtype, block_size, head_size)",),
    ),
    Relied(
        "vllm.model_executor.layers.attention.Attention",
        "a layer: its heads, its cache, and whose cache it shares",
        (
            *("num_heads", "num_kv_heads", "head_size", "head_size_v", "impl"),
            *("attn_type", "sliding_window", "kv_sharing_target_layer_name"),
            *("kv_cache", "kv_cache_torch_dtype"),
        ),
    ),
    Relied(
        "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase",
        "tells layers with a cache of another kind",
    ),
    Relied(
        "vllm.model_executor.layers.activation.SiluAndMul",
        "replaced while a model is built: one kernel",
        ("forward_cpu(x)",),
    ),
    Relied(
        "vllm.v1.sample.logits_processor.AdapterLogitsProcessor",
        "subclassed: forces tokens",
        (
            *("new_req_logits_processor(params)", "is_argmax_invariant()"),
            "validate_params(sampling_params)",
        ),
    ),
]

_STATES = [
    Relied(
        "vllm.model_executor.layers.mamba.abstract.MambaBase",
        "a layer that keeps a state; vLLM's own code serves it",
        ("get_kv_cache_spec(vllm_config)", "bind_kv_cache(kv_cache)"),
    ),
    Relied(
        "vllm.model_executor.models.ModelRegistry",
        "finds the class of a model, which tells the shapes of its states: "
        "get_mamba_state_shape_from_config, get_mamba_state_dtype_from_config",
        ("resolve_model_cls(architectures, model_config)",),
    ),
    Relied(
        "vllm.v1.kv_cache_interface.MambaSpec",
        "shape of a state; a request has one block of it, found in its block table",
        ("page_size_padded", "page_size_bytes"),
    ),
    Relied(
        "vllm.v1.kv_cache_interface.KVCacheGroupSpec",
        "layers with one block table; states are groups behind that of head pages",
        ("(layer_names, kv_cache_spec)",),
    ),
    Relied(
        "vllm.v1.core.kv_cache_utils.get_kv_cache_config_from_groups",
        "how states lie in the bytes that are set aside for them",
        ("(vllm_config, kv_cache_groups, available_memory)",),
    ),
    Relied(
        "vllm.v1.worker.utils.allocate_kv_cache",
        "sets them aside; the runner does it for head pages alone",
        ("(kv_cache_config, device, layout)",),
    ),
]

_SERVER = [
    Relied(
        "vllm.v1.engine.utils",
        "replaced: the engine is a fork of the server",
        ("get_mp_context()", "CoreEngineProcManager"),
    ),
    Relied(
        "vllm.v1.structured_output.StructuredOutputManager",
        "compiles grammars as the engine will",
        ("(vllm_config)", "backend"),
    ),
    Relied(
        "vllm.v1.structured_output.request.StructuredOutputRequest",
        "what it compiles",
        ("(params)",),
    ),
    Relied("vllm.v1.metrics.prometheus.get_prometheus_registry", "counters", ("()",)),
]

_REPLACED = [
    Relied(
        "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU",
        "subclassed, and named by the platform while a model is built: rows without "
        "an adapter, which have -1 here, are left alone",
        (
            *("token_lora_indices", "sampler_indices", "add_lora_linear(y)"),
            *("add_lora_embedding(y)", "add_lora_logits(y)"),
        ),
    ),
    Relied(
        "vllm.v1.worker.block_table.BlockTable",
        "its instance's method is replaced: nobody reads page lists on the device",
        ("commit_block_table(num_reqs)",),
    ),
    Relied(
        "vllm.v1.engine.async_llm.AsyncLLM",
        "likewise: requests are checked as they come, their errors told apart",
        ("generate(prompt, sampling_params)",),
    ),
    Relied(
        "vllm.renderers.online_renderer.OnlineRenderer",
        "likewise: constraints are compiled once a request is rendered",
        (
            *("render_chat(request)", "render_completion(request)"),
            "render_responses(request)",
        ),
    ),
    Relied(
        "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat",
        "its instance's method is replaced: beams and samples are checked first",
        ("create_chat_completion(request)", "default_sampling_params"),
    ),
    Relied(
        "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion",
        "likewise",
        ("create_completion(request)", "default_sampling_params"),
    ),
    Relied(
        "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses",
        "likewise, before its stream begins",
        (
            "create_responses(request)",
            "_generate_with_builtin_tools(request_id, engine_input, sampling_params)",
        ),
    ),
]
"""Not imported: what the API server's instances have, by the class that we know."""

BORDER = [*_SCHEDULING, *_WORKER, *_STATES, *_SERVER]
REPLACED = _REPLACED
