# SPDX-License-Identifier: Apache-2.0
"""``kvserve serve``: vLLM's OpenAI server under a cache policy."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvserve.engine.fork import let_engine_fork
from kvserve.engine.options import (
    engine_options,
    explicit_options,
    prepare_environment,
    stock_has_no_policies,
)
from kvserve.engine.preflight import check_start, policy_in_words
from kvserve.engine.settings import PolicySettings
from kvserve.errors import UserError
from kvserve.http.draining import engine_died
from kvserve.http.settings import MIDDLEWARE, HttpSettings, add_http_arguments
from kvserve.models import EMBEDDED_MODEL, resolve_model
from kvserve.processor import settle_dtype
from kvserve.profiling.fast import profile_arguments
from kvserve.start_up import VERBOSE, Address, Progress
from policies.head_scores import has_shipped_profile
from policies.registry import STOCK, parse_arguments

_EXAMPLES = """examples:
  kvserve serve                                  the embedded model, port 8000
  kvserve serve --policy h2o:budget=25%          a quarter of the cache
  kvserve serve --policy sink-recent:sinks=32,recent=992
  kvserve serve meta-llama/Llama-3.1-8B-Instruct --policy duo.toml
  kvserve serve --allow-request-policies         a request may name another policy:
                 "vllm_xargs": {"kv_policy": "full"} or "sink-recent:recent=480"
  kvserve serve --policy none                    stock vLLM, to compare
  kvserve serve --api-key KEY --rate-limit 60/minute --shutdown-timeout 30

Every flag of `vllm serve` works; see --help=all.
"""


def add_policy_arguments(
    parser: argparse.ArgumentParser, several: bool = False
) -> None:
    """Add ``--policy``, which ``several`` lets be given again, and ``--policy-arg``."""
    group = parser.add_argument_group("kvserve", "Per-head KV-cache policy")
    again = "; give it again to compare" if several else ""
    group.add_argument(
        "--policy",
        action="append" if several else "store",
        default=None,
        metavar="NAME[:KEY=VALUE,...]|FILE.toml",
        help="cache policy, a TOML file that sets one, or `none` for stock vLLM; "
        "besides its own parameters every policy takes budget=25%% (of the KV entries "
        "of the longest request) or budget=512 (tokens); see `kvserve policies`. "
        f"Default: `retrieval` where a profile ships for the model, else `full`{again}",
    )
    group.add_argument(
        "--policy-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a parameter of the policy; may be given several times",
    )


def _add_cuda_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experimental-cuda",
        action="store_true",
        help="let a policy start on an NVIDIA GPU, where this version has never run; "
        "see docs/architecture.md. The environment's KVSERVE_EXPERIMENTAL_CUDA=1 does "
        "the same for every command",
    )


def add_request_policies(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-request-policies``, which servers and their plans know."""
    group = parser.add_argument_group("kvserve requests", "A policy per request")
    group.add_argument(
        "--allow-request-policies",
        action="store_true",
        help="let a request name a policy of its own, of positions like the server's, "
        'in its body: "vllm_xargs": {"kv_policy": "full"} or {"kv_policy": '
        '"sink-recent:recent=480"}. The pool must hold the longest request under '
        "`full` (default: a request that names one gets 400)",
    )


def _check_request_policies(
    args: argparse.Namespace, settings: PolicySettings | None
) -> None:
    if settings is None:
        raise stock_has_no_policies()
    if args.grpc:
        raise UserError(
            "--allow-request-policies: --grpc lets requests by without a check of what "
            "they name; leave one of them out"
        )


def choose_policy(
    policy: str | None, policy_args: list[str], model: str, measure: bool = True
) -> PolicySettings | None:
    """Settle the policy; ``None`` means stock vLLM.

    Args:
        measure: make the profile that the policy needs and nobody has made.
    """
    arguments: dict[str, Any] = {**parse_arguments(policy_args)}
    if policy == STOCK:
        if arguments:
            raise UserError("--policy-arg: --policy none takes no arguments")
        return None
    if policy is None:
        policy = "retrieval" if has_shipped_profile(Path(model).name) else "full"
        if policy == "full":
            print(
                f"kvserve: no profile ships for {Path(model).name}: policy full, "
                "which evicts nothing; to compress, give --policy retrieval, which "
                "measures the model once, or --policy sink-recent:budget=25%",
                file=sys.stderr,
            )
    # Refuses typing mistakes before anything is loaded.
    settled = profile_arguments(policy, arguments, model, make=measure)
    return PolicySettings(policy, settled)


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
    if runs_on := prepare_environment(vars(args)):
        print(f"kvserve: {runs_on}", file=sys.stderr)
    settings = choose_policy(args.policy, args.policy_arg, args.model)
    if args.allow_request_policies:
        _check_request_policies(args, settings)
    words = ["none: stock vLLM, which keeps every token for every head"]
    if settings is not None:
        settings = dataclasses.replace(
            settings, allow_request_policies=args.allow_request_policies
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
