# SPDX-License-Identifier: Apache-2.0
"""Checks in the front-end process, before any engine process starts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from vllm import envs
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.mem_constants import GiB_bytes
from vllm.utils.torch_utils import get_dtype_size

from kvserve.engine.settings import CONFIG_KEY, FILES, PolicySettings
from kvserve.engine.start.compiler import check_compiler
from kvserve.engine.start.layers import (
    cannot_share,
    check_model,
    model_shape_of,
    state_bytes,
)
from kvserve.engine.start.support import (
    budgets_of,
    check_batch,
    fits,
    full_scratch_of,
    page_format_of,
    rule_of,
    scratch_of,
)
from kvserve.errors import UserError
from kvserve.plan.rule import Rule
from kvserve.units import format_bytes
from policies.files import digests


def check_start(options: dict[str, Any]) -> VllmConfig:
    """Check that an engine with these options can serve its policy.

    Args:
        options: engine options that name a policy (``options.engine_options``); they
            learn of the files that were read, and whether prefixes are shared.

    Returns:
        The configuration that vLLM makes of the options.

    Raises:
        UserError: one line on what is wrong and what to do.
    """
    config, alone = _config_of(options), ""
    if options.get("enable_prefix_caching") is None:
        alone = cannot_share(config) or _no_room_to_share(config)
        options["enable_prefix_caching"] = not alone
    if alone:
        config = _config_of(options)
    check_model(config)
    page_format_of(config)
    rule = rule_of(config)
    check_batch(config, rule)
    check_pool(config, rule)
    _check_compiler(config.compilation_config.mode)
    if alone:
        print(f"kvserve: prefix caching is off: {alone}", file=sys.stderr)
    # For the processes that the engine is yet to start in.
    options["additional_config"][CONFIG_KEY][FILES] = digests()
    return config


def _no_room_to_share(config: VllmConfig) -> str:
    """Say why a pool that holds the longest request cannot share prefixes, if so."""
    check_model(config)
    rule = rule_of(config)
    try:
        check_pool(config, rule)
    except UserError:
        return (
            "the pool has no room for the tokens of a step besides the longest request"
        )
    return ""


def _config_of(options: Mapping[str, Any]) -> VllmConfig:
    """Have vLLM make a configuration, and say in one line why it does not.

    Raises:
        UserError: that line.
    """
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    known = {name: value for name, value in options.items() if name in fields}
    try:
        return EngineArgs(**known).create_engine_config()
    except ValidationError as error:
        problems = "; ".join(str(e["msg"]) for e in error.errors())
        problems = problems.removeprefix("Value error, ")
        if "tensor parallel size" in problems:
            problems = (
                f"--tensor-parallel-size={options['tensor_parallel_size']}: "
                f"{problems.removesuffix('.')}; use a number that divides them, or "
                "--data-parallel-size"
            )
        raise UserError(problems) from None
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from None


def check_stock(args: argparse.Namespace) -> None:
    """Check what stock vLLM would find out late, and say in a traceback.

    Raises:
        UserError: one line on what is wrong and what to do.
    """
    if not (args.enforce_eager or str(args.optimization_level) == "0"):
        _check_compiler(args.compilation_config.mode)


def _check_compiler(mode: CompilationMode | None) -> None:
    if current_platform.is_cpu() and mode != CompilationMode.NONE:
        check_compiler()


def policy_in_words(config: VllmConfig) -> list[str]:
    """Say what the policy keeps of this model, a line for each thing to say."""
    settings, rule = PolicySettings.from_config(config), rule_of(config)
    return [f"{settings.policy}: {rule.describe()}", *rule.remarks()]


def page_bytes_of(config: VllmConfig) -> int:
    """Bytes of one head page: keys, values and scales of one block of one head."""
    model, page_format = config.model_config, page_format_of(config)
    tokens = config.cache_config.block_size
    head_size = model_shape_of(config).head_size
    if page_format:
        return tokens * page_format.token_bytes(head_size)
    return tokens * 2 * head_size * get_dtype_size(cast(torch.dtype, model.dtype))


def pool_pages(config: VllmConfig, size: int) -> int:
    """Pages that requests can have of a pool of ``size`` bytes."""
    # One page less: vLLM's block 0 is never given out.
    pages = (size - state_bytes(config)) // page_bytes_of(config)
    return pages - scratch_of(config, rule_of(config)) - 1


def what_fits(config: VllmConfig, pool: int) -> str:
    """Say how many requests of some lengths a pool holds at once, and a full cache.

    Args:
        pool: pages that requests can have.
    """
    rule, longest = rule_of(config), config.model_config.max_model_len
    everything = pool + scratch_of(config, rule)
    full_pool = everything - full_scratch_of(config, rule)
    found = [
        f"{fits(rule, length, pool)} requests of {length} tokens"
        f" (full cache: {full_pool // rule.full.pages(length)})"
        for length in (longest // 4, longest)
    ]
    size = format_bytes((everything + 1) * page_bytes_of(config))
    least = " at the least budget" if budgets_of(config) else ""
    return f"{size} hold{least} {', or '.join(found)}"


def _pool_bytes(config: VllmConfig) -> int | None:
    size = config.cache_config.kv_cache_memory_bytes
    if size is None and envs.VLLM_CPU_KVCACHE_SPACE:
        size = int(envs.VLLM_CPU_KVCACHE_SPACE * GiB_bytes)
    return size


def check_pool(config: VllmConfig, rule: Rule) -> None:
    """Refuse a pool that cannot hold one request of the longest length.

    A pool that vLLM sizes itself is checked by the engine process.
    """
    size = _pool_bytes(config)
    if size is None:
        return
    length = config.model_config.max_model_len
    most, why = rule.least_pool(length), "under this policy"
    if rule.mixed:
        why = "under `full`, which --allow-request-policies lets it name"
    # One page more: vLLM's block 0 is never given out.
    pages = most + scratch_of(config, rule) + 1
    states = state_bytes(config)
    needed = pages * page_bytes_of(config) + states
    if size < needed:
        beside, or_fewer = "", ""
        if states:
            beside = f", {states} of them for states of --max-num-seqs"
            or_fewer = ", lower --max-num-seqs"
        raise UserError(
            f"--kv-cache-memory-bytes={size}: one request of --max-model-len={length} "
            f"needs {needed} bytes ({format_bytes(needed)}{beside}) {why}; give more "
            f"memory{or_fewer} or lower --max-model-len"
        )
