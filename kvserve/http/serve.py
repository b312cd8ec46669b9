# SPDX-License-Identifier: Apache-2.0
"""``kvserve serve``: vLLM's OpenAI server under a cache policy."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.arguments import (
    add_policy_arguments,
    add_request_policies,
    choose_policy,
)
from kvserve.engine.start.fork import let_engine_fork
from kvserve.engine.start.options import (
    engine_options,
    explicit_options,
    prepare_environment,
    stock_has_no_policies,
)
from kvserve.engine.start.preflight import check_start, check_stock, policy_in_words
from kvserve.errors import UserError
from kvserve.http.draining import engine_died
from kvserve.http.parsers import choose_parsers
from kvserve.http.settings import MIDDLEWARE, HttpSettings, add_http_arguments
from kvserve.models import EMBEDDED_MODEL, resolve_model
from kvserve.processor import settle_dtype
from kvserve.start_up import VERBOSE, Address, Progress

_EXAMPLES = """examples:
  kvserve serve                                  the embedded model, port 8000
  kvserve serve --policy h2o:budget=25%          a quarter of the cache
  kvserve serve --policy kvzap:budget=50%..12.5%   less where many requests wait
  kvserve serve --policy sink-recent:sinks=32,recent=992
  kvserve serve meta-llama/Llama-3.1-8B-Instruct --policy duo.toml
  kvserve serve --allow-request-policies         a request may name another policy:
                 "vllm_xargs": {"kv_policy": "full"} or "sink-recent:recent=480"
  kvserve serve --policy none                    stock vLLM, to compare
  kvserve serve --api-key KEY --rate-limit 60/minute --shutdown-timeout 30

Every flag of `vllm serve` works; see --help=all.
"""


def _add_cuda_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experimental-cuda",
        action="store_true",
        help="let a policy start on an NVIDIA GPU, where this version has never run; "
        "see docs/architecture.md. The environment's KVSERVE_EXPERIMENTAL_CUDA=1 does "
        "the same for every command",
    )


def _check_request_policies(
    args: argparse.Namespace, settings: PolicySettings | None, flag: str
) -> None:
    if settings is None:
        raise stock_has_no_policies(flag)
    if args.grpc:
        raise UserError(
            f"{flag}: --grpc lets requests by without a check of what they ask for; "
            "leave one of them out"
        )


def serve(argv: list[str], quiet: bool = False) -> int:
    """Run the server until it is stopped.

    Args:
        quiet: show no more than a user acts on.
    """
    parser = FlexibleArgumentParser(  # type: ignore[no-untyped-call]
        prog="kvserve serve",
        description="Serve a model over the OpenAI API with per-head KV budgets.",
        epilog=_EXAMPLES,
    )
    parser = make_arg_parser(parser)
    add_policy_arguments(parser)
    _add_cuda_argument(parser)
    add_request_policies(parser)
    add_http_arguments(parser)
    _add_verbose(parser)
    # Its default would not tell who asked for it from who did not.
    parser.set_defaults(optimization_level=None)
    args = parser.parse_args(argv)
    level = args.optimization_level
    if level is None:
        args.optimization_level = EngineArgs.optimization_level
    HttpSettings.from_args(args)  # refuses flags before anything is loaded
    args.middleware = [*args.middleware, *MIDDLEWARE]
    args.subparser = "serve"
    address = Address.of(args.host, args.port, args.ssl_certfile is not None)
    if not (args.uds or args.headless):
        address.check_free()
    _resolve_model(args)
    args.dtype = settle_dtype(args.dtype)
    choose_parsers(args)
    if runs_on := prepare_environment(vars(args)):
        print(f"kvserve: {runs_on}", file=sys.stderr)
    settings = choose_policy(args.policy, args.policy_arg, args.model)
    for flag in ("--allow-request-policies", "--protect"):
        if getattr(args, flag[2:].replace("-", "_")):
            _check_request_policies(args, settings, flag)
    if settings is None:
        check_stock(args)
        words = ["none: stock vLLM, which keeps every token for every head"]
    else:
        settings = dataclasses.replace(
            settings,
            allow_request_policies=args.allow_request_policies,
            protect=args.protect,
        )
        given = explicit_options(vars(args))
        if level is not None:
            given["optimization_level"] = level
        options = engine_options(settings, given)
        words = policy_in_words(check_start(options))
        for name, value in options.items():
            setattr(args, name, value)
    validate_parsed_serve_args(args)
    if quiet:
        args.use_tqdm_on_load = False
        if args.uvicorn_log_level == "info":
            args.uvicorn_log_level = "warning"
    if not (args.uds or args.headless):
        name = (args.served_model_name or [args.model])[0]
        Progress(address, name, words).start()
    let_engine_fork()
    ServeSubcommand.cmd(args)
    # vLLM's server ends in good order even when its engine was killed.
    return int(engine_died.is_set())


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        VERBOSE,
        action="store_true",
        help="show all of vLLM's log; VLLM_LOGGING_LEVEL chooses how much (default: "
        "errors)",
    )


def _resolve_model(args: argparse.Namespace) -> None:
    named = args.model_tag or (args.model if args.model != EngineArgs.model else None)
    args.model = args.model_tag = resolve_model(named)
    if named in (None, EMBEDDED_MODEL) and args.served_model_name is None:
        args.served_model_name = [EMBEDDED_MODEL]
