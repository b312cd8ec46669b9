# SPDX-License-Identifier: Apache-2.0
"""``kvserve plan``: what a policy makes of a pool, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses

from vllm.config import VllmConfig

from kvserve.engine.options import engine_options
from kvserve.engine.preflight import check_start, page_bytes_of
from kvserve.engine.serve import (
    add_policy_arguments,
    add_request_policies,
    choose_policy,
)
from kvserve.engine.support import fits, rule_of, scratch_of
from kvserve.errors import UserError
from kvserve.models import resolve_model
from kvserve.processor import settle_dtype
from kvserve.units import format_bytes, parse_bytes

_EXAMPLES = """examples:
  kvserve plan --policy retrieval --max-model-len 8192 --kv-memory 512MiB
  kvserve plan MODEL --policy sink-recent --policy-arg recent=480 --kv-memory 8G
  kvserve plan --tensor-parallel-size 3 --kv-memory 512MiB    what ranks cost
  kvserve plan --kv-cache-dtype int8_per_token_head --kv-memory 512MiB

No weights are loaded.
"""


def plan(argv: list[str]) -> int:
    """Print how many requests a pool holds under a policy and under ``full``."""
    parser = argparse.ArgumentParser(
        prog="kvserve plan",
        description="Show KV bytes a request and requests a pool, against the full "
        "cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="model name or directory")
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
    add_policy_arguments(parser)
    add_request_policies(parser)
    args = parser.parse_args(argv)
    memory = parse_bytes(args.kv_memory, "--kv-memory")
    model = resolve_model(args.model)
    settings = choose_policy(args.policy, args.policy_arg, model)
    if settings is None:
        raise UserError("--policy none: there is nothing to plan; try --policy full")
    settings = dataclasses.replace(
        settings, allow_request_policies=args.allow_request_policies
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
            "enable_prefix_caching": False,
        },
    )
    config = check_start(options, announce=True)
    print(_report(config, memory, args.max_num_seqs))
    return 0


def _report(config: VllmConfig, memory: int, max_requests: int) -> str:
    ours = rule_of(config)
    full, scratch = ours.full, scratch_of(config, ours)
    page = page_bytes_of(config)
    pool, full_pool = memory // page - scratch - 1, memory // page - 1
    ranks = config.parallel_config.tensor_parallel_size
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    lines = [
        f"pool {format_bytes(memory)}{each} of {format_bytes(page)} pages; "
        f"{format_bytes(scratch * page)} of it is scratch for prefill",
        "",
        f"{'tokens':>8} {'KV a request':>14} {'full cache':>12} {'kept':>7} "
        f"{'requests fit':>13} {'full fits':>10} {'gain':>6}",
    ]
    needless = []
    for length in _lengths(config.model_config.max_model_len):
        held, held_full = ours.pages(length), full.pages(length)
        fit = fits(ours, length, pool)
        fits_full = full_pool // held_full
        gain = fit / fits_full if fits_full else float("inf")
        lines.append(
            f"{length:>8} {format_bytes(held * page):>14} "
            f"{format_bytes(held_full * page):>12} {held / held_full:>7.1%} "
            f"{fit:>13} {fits_full:>10} {gain:>5.2f}x"
        )
        if fits_full >= max_requests:
            needless.append(length)
    if needless:
        lines += [
            "",
            f"Up to {max(needless)} tokens compression cannot raise throughput: the "
            f"full cache already holds all {max_requests} requests of --max-num-seqs.",
        ]
    return "\n".join(lines)


def _lengths(longest: int) -> list[int]:
    powers = [1 << n for n in range(9, longest.bit_length()) if 1 << n < longest]
    return [*powers[-5:], longest]
