# SPDX-License-Identifier: Apache-2.0
"""From a policy and a user's vLLM options to options that vLLM can start with.

Options that this version cannot honour are refused when somebody asked for them, and
switched off with one log line when they are merely vLLM's default.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import (
    DEFAULT_PLUGINS_GROUP,
    IO_PROCESSOR_PLUGINS_GROUP,
    PLATFORM_PLUGINS_GROUP,
    STAT_LOGGER_PLUGINS_GROUP,
)

from kvserve.cores import Cores, share_threads
from kvserve.engine.devices import cpu_operators, hardware
from kvserve.engine.devices.cpu import PAGE_SIZE
from kvserve.engine.settings import CONFIG_KEY, PolicySettings
from kvserve.engine.start.speculation import check_guessing
from kvserve.errors import UserError
from kvserve.kernels.page_formats import FORMATS, FP8, INT8
from policies.base import Capabilities

EXPERIMENTAL_CUDA = "KVSERVE_EXPERIMENTAL_CUDA"
"""Environment: 1 lets a policy start on CUDA, as ``--experimental-cuda`` does."""

_CPU_WORKER = "kvserve.engine.worker.worker.HeadPagedCPUWorker"
_GPU_WORKER = "kvserve.engine.worker.worker.HeadPagedWorker"
_SCHEDULER = "kvserve.engine.scheduling.scheduler.HeadPagedScheduler"
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_UNNAMED = ("auto", "nobind")
"""Settings of the binding that name no cores."""
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_STOCK = "or serve with stock vLLM: `--policy none`"
_ANY_POLICY = (
    "prefix caching is off, for requests may name policies that cannot share; "
    "--enable-prefix-caching turns it on, and has those refused"
)

_REFUSED: dict[str, str] = {
    "kv_transfer_config": "KV connectors move whole-layer blocks, not head pages",
    "kv_offloading_size": "KV offloading moves whole-layer blocks, not head pages",
    "kv_events_config": "KV events describe whole-layer blocks, not head pages",
    "kv_sharing_fast_prefill": "all layers already share one pool of head pages",
    "kv_cache_dtype_skip_layers": "all layers share one pool of one type",
}
_PARALLEL = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
_IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_COMPILING = {"optimization_level", "compilation_config"}
_PER_REPLICA = ("tensor_parallel_size", "pipeline_parallel_size")


def engine_options(
    settings: PolicySettings, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return vLLM options that serve a policy.

    Args:
        settings: the policy.
        options: vLLM engine options by field name, as far as the user gave them.

    Raises:
        UserError: an option that head pages cannot honour.
    """
    check_platform()
    for name, why in _REFUSED.items():
        if options.get(name):
            raise UserError(f"{_flag(name)}: {why}; leave it out, {_STOCK}")
    for name in _PARALLEL:
        if (options.get(name) or 1) > 1:
            raise UserError(
                f"{_flag(name)}={options[name]}: a policy divides heads among ranks, "
                f"not layers or tokens; use --tensor-parallel-size, {_STOCK}"
            )
    _check_cache_type(options)
    check_guessing(options)
    block_size = _block_size(settings, options)
    additional = dict(options.get("additional_config") or {})
    if CONFIG_KEY in additional:
        raise UserError(
            f"--additional-config: its key {CONFIG_KEY!r} is the policy's; use "
            "--policy and --policy-arg"
        )
    return {
        **options,
        "block_size": block_size,
        "worker_cls": _worker(),
        **_prefixes_and_scheduler(settings, options),
        **(_on_gpu(options) if hardware.has_gpu() else _on_cpu(options)),
        "additional_config": {**additional, **settings.to_additional_config()},
    }


def _worker() -> str:
    return _GPU_WORKER if hardware.has_gpu() else _CPU_WORKER


def _on_cpu(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which an engine on a CPU starts in seconds instead of minutes.

    A worker that is alone runs in the engine's process: one import of vLLM less, and
    no messages between the two. vLLM keeps them apart on CPUs, for it once could not
    bind a process's threads by itself. And nothing is compiled unless somebody asks.
    """
    chosen: dict[str, Any] = {}
    ranks = math.prod(options.get(name) or 1 for name in _PER_REPLICA)
    # Alone in its process it would have no list of cores that the user names.
    bound = _named_cores() not in (None, *_UNNAMED)
    if not (ranks > 1 or bound or options.get("distributed_executor_backend")):
        chosen["distributed_executor_backend"] = _IN_ENGINE
    eager = options.get("enforce_eager", not _COMPILING & options.keys())
    if eager and not options.get("kernel_config"):
        chosen["kernel_config"] = cpu_operators.CHOICE
    return {**chosen, "enforce_eager": eager}


def _on_gpu(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a GPU needs and a CPU has anyway."""
    if options.get("attention_backend"):
        raise UserError(
            f"--attention-backend={options['attention_backend']}: a policy brings its "
            f"own; leave it out, {_STOCK}"
        )
    if options.get("async_scheduling"):
        raise UserError(
            "--async-scheduling: the schedulers of policies plan one step at a time; "
            f"leave it out, {_STOCK}"
        )
    return {"async_scheduling": False}


def _prefixes_and_scheduler(
    settings: PolicySettings, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Settle whether requests share prefixes, and name the scheduler that it takes.

    Returns:
        ``enable_prefix_caching`` is ``None`` where the model decides: nobody asked, and
        nothing but its layers can be in the way.
    """
    asked: bool | None = options.get("enable_prefix_caching")
    theirs = options.get("scheduler_cls")
    record = settings.without_budget().capabilities
    if asked:
        _check_sharing(settings.policy, record)
    needs = {
        "--allow-request-policies": settings.allow_request_policies,
        f"--protect {settings.protect}": bool(settings.protect),
        f"--policy {settings.policy}": bool(
            settings.spec.least or record.elastic or record.prefill == "dense"
        ),
        "--enable-prefix-caching": asked,
    }
    why = [flag for flag, needed in needs.items() if needed]
    if theirs not in (None, _SCHEDULER):
        if why:
            raise UserError(
                f"--scheduler-cls={theirs}: {why[0]} runs under "
                f"{_SCHEDULER.rpartition('.')[2]} here; leave it out"
            )
        return {"scheduler_cls": theirs, "enable_prefix_caching": False}
    shares = record.prefix_cacheable if asked is None else asked
    if asked is None and shares and settings.allow_request_policies:
        print(f"kvserve: {_ANY_POLICY}", file=sys.stderr)
        shares = False
    return {
        "scheduler_cls": _SCHEDULER,
        "enable_prefix_caching": None if shares and asked is None else shares,
    }


def _check_sharing(policy: str, record: Capabilities) -> None:
    """Refuse to share pages under a policy that cannot.

    Raises:
        UserError: names the flag, and why.
    """
    if record.prefix_cacheable:
        return
    why = (
        "keeps of a prefix what the text behind it attends to, so requests cannot "
        "share pages"
        if record.scores_tokens
        else "does not let requests share pages (its record is not prefix_cacheable)"
    )
    raise UserError(
        f"--enable-prefix-caching: policy {policy} {why}; leave it out, "
        "or choose a policy of positions such as retrieval"
    )


def stock_has_no_policies(flag: str = "--allow-request-policies") -> UserError:
    """What to say when requests are to ask for policies, but get stock vLLM."""
    return UserError(
        f"{flag}: --policy none is stock vLLM, which has no policies; leave the flag "
        "out, or start with --policy full"
    )


def _block_size(settings: PolicySettings, options: Mapping[str, Any]) -> int:
    """Tokens of a page: what the user asks for, unless the policy insists."""
    policy = settings.without_budget()
    own = policy.page_size
    block_size: int = options.get("block_size") or own or PAGE_SIZE
    if block_size % PAGE_SIZE:
        raise UserError(
            f"--block-size={block_size}: a head page holds a multiple of "
            f"{PAGE_SIZE} tokens"
        )
    if own not in (None, block_size):
        raise UserError(
            f"--block-size={block_size}: --policy {settings.policy} thinks in blocks "
            f"of {own} tokens; leave it out"
        )
    return block_size


def prepare_environment(options: Mapping[str, Any]) -> str:
    """Make sure that vLLM loads our plugin and uses every CPU it may use, and no more.

    Args:
        options: vLLM engine options by field name; those left out are defaults.

    Returns:
        What runs on which cores, in words; nothing where a GPU does the work.
    """
    named = os.environ.get("VLLM_PLUGINS")
    plugins = _installed_plugins() if named is None else set(named.split(","))
    os.environ["VLLM_PLUGINS"] = ",".join(sorted((plugins | {"kvserve"}) - {""}))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # on GPUs vLLM tells its makers
    if current_platform.is_cpu():
        return _bind_threads(local_workers(options))
    if options.get("experimental_cuda"):
        os.environ[EXPERIMENTAL_CUDA] = "1"
    return ""


def local_workers(options: Mapping[str, Any]) -> int:
    """Worker processes that the options start on this machine."""
    sizes = [options.get(name) or 1 for name in _PER_REPLICA]
    replicas = options.get("data_parallel_size_local")
    if replicas is None:
        replicas = options.get("data_parallel_size") or 1
    return max(math.prod(sizes) * replicas, 1)


def _bind_threads(workers: int) -> str:
    """Give every worker threads and cores of its own, unless the user did.

    vLLM's automatic binding leaves one core idle, and wants a NUMA node per worker.

    Returns:
        What runs on what.
    """
    asked = _named_cores()
    if asked is None:
        os.environ[_BINDING] = _binding(workers)
    elif asked not in _UNNAMED and asked.count("|") + 1 != workers:
        raise UserError(
            f"{_BINDING}={asked}: names cores for {asked.count('|') + 1} workers, but "
            f"{workers} will run; part {workers} lists with |, or unset it"
        )
    threads = share_threads(workers)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # read the environment when it was imported
    if asked in (None, *_UNNAMED):
        return Cores.of_this_process().describe(workers)
    return f"threads on cores as {_BINDING}={asked} says"


def _named_cores() -> str | None:
    """What the user set for binding threads, if he did."""
    asked = os.environ.get(_BINDING)
    # An engine that this process started before may have had other workers.
    ours = {_binding(count + 1) for count in range(len(os.sched_getaffinity(0)))}
    return None if asked in ours else asked


def _binding(workers: int) -> str:
    """Deal cores to workers as vLLM reads it: ``0,1|2,3``."""
    cores = Cores.of_this_process()
    # Which cores a quota's time is spent on is for the system to choose: others, with
    # quotas of their own, may run on the first ones too.
    if cores.is_cut or cores.count < workers:
        return "nobind"
    ends = [cores.count * place // workers for place in range(workers + 1)]
    return "|".join(
        ",".join(map(str, cores.visible[first:last]))
        for first, last in itertools.pairwise(ends)
    )


def _installed_plugins() -> set[str]:
    """Plugins that vLLM loads unasked; it wants those with routes to be named."""
    return {
        point.name
        for group in (
            DEFAULT_PLUGINS_GROUP,
            IO_PROCESSOR_PLUGINS_GROUP,
            PLATFORM_PLUGINS_GROUP,
            STAT_LOGGER_PLUGINS_GROUP,
        )
        for point in entry_points(group=group)
    }


def explicit_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine options in ``values`` that differ from vLLM's defaults."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(EngineArgs)}
    return {
        name: value
        for name, value in values.items()
        if name in defaults and value != defaults[name]
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of one field: whoever makes the whole looks up vLLM's own model."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check_platform() -> None:
    """Refuse what no policy runs on; on CUDA, what nobody has asked for.

    Raises:
        UserError: says what to set or unset.
    """
    if not current_platform.is_cpu():
        _check_gpu()
    if os.environ.get(_RUNNER, "0") not in ("", "0"):
        raise UserError(f"{_RUNNER}=1: policies need vLLM's V1 model runner; unset it")


def _check_gpu() -> None:
    name = current_platform.device_name or "this device"
    if not current_platform.is_cuda():
        raise UserError(
            f"--policy: this version serves policies on CPUs only; on {name} use "
            "`--policy none`"
        )
    if os.environ.get(EXPERIMENTAL_CUDA) != "1":
        raise UserError(
            "--policy: this version serves policies on CPUs only, and has never run "
            f"on {name}; use `--policy none`, or try it with --experimental-cuda "
            f"({EXPERIMENTAL_CUDA}=1)"
        )
    # vLLM's V2 runner is the default on CUDA, and knows no worker's hooks.
    os.environ.setdefault(_RUNNER, "0")


def _check_cache_type(options: Mapping[str, Any]) -> None:
    cache_dtype = options.get("kv_cache_dtype") or "auto"
    if cache_dtype.startswith("fp8") and cache_dtype not in FORMATS:
        raise UserError(
            f"--kv-cache-dtype={cache_dtype}: head pages have a scale for each token, "
            f"not for a whole layer; use {FP8.name}, or {INT8.name}, {_STOCK}"
        )
    if cache_dtype not in ("auto", "float16", *FORMATS):
        known = ", ".join(FORMATS)
        raise UserError(
            f"--kv-cache-dtype={cache_dtype}: head pages hold the model's own type, or "
            f"one of {known}; use auto or one of those, {_STOCK}"
        )
    worker = options.get("worker_cls") or "auto"
    if worker not in ("auto", _worker()):
        raise UserError(
            f"--worker-cls={worker}: a policy brings its own worker; leave it out, "
            f"{_STOCK}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
