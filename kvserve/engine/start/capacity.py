# SPDX-License-Identifier: Apache-2.0
"""``kvserve plan``: what a policy makes of a pool, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter

from vllm.config import VllmConfig

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.arguments import (
    add_policy_arguments,
    add_request_policies,
    choose_policy,
)
from kvserve.engine.start.layers import model_shape_of, state_bytes, state_layers
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import (
    check_start,
    page_bytes_of,
    policy_in_words,
    pool_pages,
)
from kvserve.engine.start.support import (
    budgets_of,
    fits,
    full_scratch_of,
    rule_of,
    scratch_of,
)
from kvserve.errors import UserError
from kvserve.models import add_model, resolve_model
from kvserve.plan.rule import Rule
from kvserve.processor import settle_dtype
from kvserve.units import format_bytes, parse_bytes

_EXAMPLES = """examples:
  kvserve plan --policy retrieval --max-model-len 8192 --kv-memory 512MiB
  kvserve plan MODEL --policy sink-recent:recent=480 --kv-memory 8G
  kvserve plan --policy h2o:budget=25% --policy snapkv:budget=25% --kv-memory 512MiB
  kvserve plan --policy kvzap:budget=50%..12.5% --kv-memory 512MiB    both ends
  kvserve plan --tensor-parallel-size 3 --kv-memory 512MiB    what ranks cost
  kvserve plan --kv-cache-dtype int8_per_token_head --kv-memory 512MiB

No weights are loaded.
"""


def plan(argv: list[str]) -> int:
    """Print how many requests a pool holds under policies and under ``full``."""
    parser = argparse.ArgumentParser(
        prog="kvserve plan",
        description="Show KV bytes a request and requests a pool, against the full "
        "cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--max-model-len", type=int, help="longest request, in tokens")
    parser.add_argument(
        "--kv-memory",
        required=True,
        metavar="BYTES",
        help="pool size, of each rank, e.g. 512MiB",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the heads of each layer",
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=256, help="requests the server may run"
    )
    parser.add_argument(
        "--dtype", default="auto", help="type to run the model in (default: as serve)"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="TYPE",
        help="what pages hold, e.g. int8_per_token_head (default: the model's type)",
    )
    add_policy_arguments(parser, several=True)
    add_request_policies(parser)
    args = parser.parse_args(argv)
    memory = parse_bytes(args.kv_memory, "--kv-memory")
    model = resolve_model(args.model)
    policies: list[str | None] = list(dict.fromkeys(args.policy or [])) or [None]
    if len(policies) > 1 and args.policy_arg:
        raise UserError(
            f"--policy-arg {args.policy_arg[0]}: of which policy? write --policy "
            f"{policies[0]}:{args.policy_arg[0]}"
        )
    configs = [_check(args, policy, model, memory) for policy in policies]
    print(f"kvserve: {layers_in_words(configs[0])}", file=sys.stderr)
    if len(configs) == 1:
        print(_report(configs[0], memory, args.max_num_seqs))
    else:
        print(_comparison(configs, memory))
    return 0


def _check(
    args: argparse.Namespace, policy: str | None, model: str, memory: int
) -> VllmConfig:
    """Check that one policy can be served as was asked, and say what it keeps."""
    settings = choose_policy(policy, args.policy_arg, model, measure=False)
    if settings is None:
        raise UserError("--policy none: there is nothing to plan; try --policy full")
    settings = dataclasses.replace(
        settings,
        allow_request_policies=args.allow_request_policies,
        protect=args.protect,
    )
    options = engine_options(
        settings,
        {
            "model": model,
            "dtype": settle_dtype(args.dtype),
            "kv_cache_dtype": args.kv_cache_dtype,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.max_num_seqs,
            "kv_cache_memory_bytes": memory,
            "tensor_parallel_size": args.tensor_parallel_size,
        },
    )
    config = check_start(options)
    for line in policy_in_words(config):
        print(f"kvserve: policy {line}", file=sys.stderr)
    return config


def _ends(config: VllmConfig) -> dict[str, Rule]:
    """Rules of the least and the largest budget of a range, by name."""
    known = budgets_of(config)
    ends = [*known][-1:] + [*known][:1]
    return {name: known[name] for name in ends}


def _contenders(config: VllmConfig) -> list[tuple[VllmConfig, str, Rule]]:
    """What a policy is compared by: both ends of a range are."""
    name = PolicySettings.from_config(config).policy
    return [
        (config, re.sub(r"budget=[^,]*", f"budget={end}", name), rule)
        for end, rule in _ends(config).items()
    ] or [(config, name, rule_of(config))]


def _comparison(configs: list[VllmConfig], memory: int) -> str:
    """Lay policies side by side: KV bytes a request, and requests that fit."""
    compared = [one for config in configs for one in _contenders(config)]
    names = [name for _, name, _ in compared]
    widths = [max(len(name), 25) for name in names]
    heads = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
    page = page_bytes_of(configs[0])
    lines = [
        f"pool {format_bytes(memory)}{_states(configs[0])}: KV a request, share of the "
        "full cache, requests that fit",
        "",
        "  ".join([f"{'tokens':>8}", f"{'full cache':>18}", *heads]),
    ]
    pools = [pool_pages(config, memory) for config, _, _ in compared]
    of_full = compared[0][2].full
    full_pool = _full_pool(configs[0], memory)
    for length in _lengths(configs[0].model_config.max_model_len):
        full = of_full.pages(length)
        fits_full = full_pool // full
        cells = [f"{length:>8}", f"{format_bytes(full * page):>10} {fits_full:>7}"]
        for (config, _, rule), pool, width in zip(compared, pools, widths, strict=True):
            held = rule.pages(length)
            size = format_bytes(held * page_bytes_of(config))
            share = held / rule.full.pages(length)
            cell = f"{size:>10} {share:>6.1%} {fits(rule, length, pool):>6}"
            cells.append(f"{cell:>{width}}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _report(config: VllmConfig, memory: int, max_requests: int) -> str:
    ours, ends = rule_of(config), _ends(config)
    scratch = scratch_of(config, ours)
    page = page_bytes_of(config)
    pool = pool_pages(config, memory)
    full_pool = _full_pool(config, memory)
    ranks = config.parallel_config.tensor_parallel_size
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    column = f"{'budget':>8} "
    beside = f"; {format_bytes(scratch * page)} of it is scratch for prefill"
    lines = [
        f"pool {format_bytes(memory)}{each} of {format_bytes(page)} pages"
        f"{beside if scratch else ''}{_states(config)}",
        "",
        f"{'tokens':>8} {column if ends else ''}{'KV a request':>14} "
        f"{'full cache':>12} {'kept':>7} {'requests fit':>13} {'full fits':>10} "
        f"{'gain':>6}",
    ]
    needless = []
    for length in _lengths(config.model_config.max_model_len):
        fits_full = full_pool // ours.full.pages(length)
        for name, rule in (ends or {"": ours}).items():
            figures = _figures(rule, length, pool, fits_full, page)
            lines.append(f"{length:>8} {f'{name:>8} ' if name else ''}{figures}")
        if fits_full >= max_requests:
            needless.append(length)
    if needless:
        lines += [
            "",
            f"Up to {max(needless)} tokens compression cannot raise throughput: the "
            f"full cache already holds all {max_requests} requests of --max-num-seqs.",
        ]
    return "\n".join(lines)


def _figures(rule: Rule, length: int, pool: int, fits_full: int, page: int) -> str:
    """What requests of one length cost under a rule, against a full cache.

    Args:
        pool: pages that requests can have.
        fits_full: requests that a full cache has room for.
        page: bytes of a page.
    """
    held, held_full = rule.pages(length), rule.full.pages(length)
    fit = fits(rule, length, pool)
    gain = fit / fits_full if fits_full else float("inf")
    return (
        f"{format_bytes(held * page):>14} {format_bytes(held_full * page):>12} "
        f"{held / held_full:>7.1%} {fit:>13} {fits_full:>10} {gain:>5.2f}x"
    )


def layers_in_words(config: VllmConfig) -> str:
    """Say what the model's layers are, and what their queries see."""
    shape, keep_states = model_shape_of(config), state_layers(config)
    kinds = Counter(str(one or "everything") for one in shape.local)
    kinds = kinds or Counter(everything=shape.num_layers)
    seen = [f"{count} see {kind}" for kind, count in sorted(kinds.items())]
    seen += [f"{len(shape.reread)} are read by further layers"] if shape.reread else []
    seen += [f"{keep_states} layers keep a state"] if keep_states else []
    alike = ((shape.num_kv_heads, shape.head_size),)
    heads = " or ".join(
        f"{count} KV heads of {size} numbers"
        for count, size in sorted(set(shape.layer_heads or alike))
    )
    return (
        f"model {shape.name}: {shape.num_layers} layers of {heads}, {', '.join(seen)}"
    )


def _states(config: VllmConfig) -> str:
    """Say what of a pool is for states, if anything."""
    size, most = state_bytes(config), config.scheduler_config.max_num_seqs
    return f", {format_bytes(size)} states of {most} requests" if size else ""


def _full_pool(config: VllmConfig, memory: int) -> int:
    """Pages that requests with a full cache could have of ``memory`` bytes."""
    rule = rule_of(config)
    everything = pool_pages(config, memory) + scratch_of(config, rule)
    return everything - full_scratch_of(config, rule)


def _lengths(longest: int) -> list[int]:
    powers = [1 << n for n in range(9, longest.bit_length()) if 1 << n < longest]
    return [*powers[-5:], longest]
