# SPDX-License-Identifier: Apache-2.0
"""What a configuration asks for: the rule of its policy, pages, scratch, steps."""

from __future__ import annotations

from functools import lru_cache

from vllm.config import VllmConfig

from kvserve.engine.devices import hardware
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.layers import model_shape_of
from kvserve.engine.start.speculation import check_method
from kvserve.errors import UserError
from kvserve.kernels.page_formats import FORMATS, FP8, INT8, PageFormat
from kvserve.plan.mixed import MixedRule
from kvserve.plan.rule import Rule, rule_under
from kvserve.plan.streaming import scratch_pages
from policies.base import ModelShape, Policy
from policies.budgets import PolicySpec
from policies.files import follows_files


def rule_of(vllm_config: VllmConfig) -> Rule:
    """Return what makes the page plan of each request, under the config's policy."""
    settings = PolicySettings.from_config(vllm_config)
    model = model_shape_of(vllm_config)
    *richer, policy = _policies_of(settings.spec, model.open)
    page_size = vllm_config.cache_config.block_size
    max_tokens = vllm_config.model_config.max_model_len
    ranks = vllm_config.parallel_config.tensor_parallel_size
    shared = vllm_config.cache_config.enable_prefix_caching
    scheduler = vllm_config.scheduler_config
    check_method(vllm_config)
    return rule_under(
        policy,
        model,
        page_size,
        max_tokens,
        ranks=ranks,
        in_flight=vllm_config.max_in_flight_tokens,
        shared=shared,
        mixed=settings.allow_request_policies,
        step_tokens=scheduler.max_num_batched_tokens - scheduler.max_num_seqs,
        richer=richer,
        protects=bool(settings.protect),
        lookahead=vllm_config.num_speculative_tokens,
    )


@follows_files
@lru_cache(maxsize=4)
def _policies_of(spec: PolicySpec, model: ModelShape) -> tuple[Policy, ...]:
    """The policy with each budget of a range, the least last.

    Several parts of a process ask, and a budget may take a search to translate.

    Args:
        model: the layers that the policy decides on; there may be none.
    """
    if not model.num_layers:
        return (spec.without_budget(),)
    return tuple(level.create(model) for level in spec.levels)


def budgets_of(vllm_config: VllmConfig) -> dict[str, Rule]:
    """Rules of the budgets of a range, as ``50%`` names them; none without a range.

    The largest is the first, the least the last.
    """
    rule = rule_of(vllm_config)
    if not (isinstance(rule, MixedRule) and rule.levels):
        return {}
    levels = PolicySettings.from_config(vllm_config).spec.levels
    names = [str(level.budget) for level in levels]
    return dict(zip(names, rule.levels, strict=True))


def page_format_of(vllm_config: VllmConfig) -> PageFormat | None:
    """What pages hold, as --kv-cache-dtype asks; ``None``: the model's own type.

    Raises:
        UserError: they cannot hold that, or not on this device.
    """
    asked, own = pages_hold(vllm_config), _type_of(vllm_config)
    if asked == own:
        return None
    model = model_shape_of(vllm_config)
    if model.layer_heads:
        raise UserError(
            f"--kv-cache-dtype={asked}: layers of {model.name} have heads of unequal "
            f"number or size, whose pages hold {own} alone; leave it out"
        )
    if asked not in FORMATS:
        raise UserError(
            f"--kv-cache-dtype={asked}: cannot hold what a model in {own} caches under "
            f"a policy; choose {', '.join(FORMATS)} or {own}"
        )
    if asked == FP8.name and not hardware.takes_fp8():
        raise UserError(
            f"--kv-cache-dtype={asked}: GPUs store fp8 since compute capability 8.9; "
            f"use {INT8.name}, or leave it out"
        )
    return FORMATS[asked]


def pages_hold(vllm_config: VllmConfig) -> str:
    """Name what pages hold, also where that is the model's own type."""
    asked = vllm_config.cache_config.cache_dtype
    return _type_of(vllm_config) if asked == "auto" else asked


def _type_of(vllm_config: VllmConfig) -> str:
    return str(vllm_config.model_config.dtype).removeprefix("torch.")


def scratch_of(vllm_config: VllmConfig, rule: Rule) -> int:
    """Pages that prefill needs beside what requests hold."""
    scheduler = vllm_config.scheduler_config
    return rule.scratch_pages(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)


def full_scratch_of(vllm_config: VllmConfig, rule: Rule) -> int:
    """Pages that prefill would need if requests kept a full cache."""
    scheduler = vllm_config.scheduler_config
    if rule.is_shared or rule.largest.lookahead:
        return 0
    return scratch_pages(
        rule.full, scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    )


def fits(rule: Rule, tokens: int, pool: int) -> int:
    """Count the requests of ``tokens`` tokens that ``pool`` pages hold at once."""
    # All but the last to come have read their prompts.
    return max((pool - rule.most_pages(tokens)) // rule.pages(tokens) + 1, 0)


def check_batch(vllm_config: VllmConfig, rule: Rule) -> None:
    """Refuse steps too short for the last chunk of a dense prefill.

    Raises:
        UserError: names the flag and the least value.
    """
    scheduler = vllm_config.scheduler_config
    least = rule.observed + scheduler.max_num_seqs
    if rule.observed and scheduler.max_num_batched_tokens < least:
        raise UserError(
            f"--max-num-batched-tokens={scheduler.max_num_batched_tokens}: policy "
            f"{rule.policy.name} reads the end of a prompt in one step beside "
            f"--max-num-seqs={scheduler.max_num_seqs} others; give at least {least}"
        )
