# SPDX-License-Identifier: Apache-2.0
"""The ``kvserve`` command.

Subcommands import what they need when they run: `kvserve policies` answers at once,
only those that start an engine wait for vLLM.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from kvserve.cores import share_threads
from kvserve.errors import UserError

_INTERRUPTED = 130  # as a shell says of what SIGINT ended

_USAGE = """usage: kvserve COMMAND [options]

commands:
  serve      serve a model over the OpenAI API under a cache policy
  policies   list the cache policies, their parameters and what each needs
  plan       show KV bytes a request and requests a pool, without loading weights
  profile    measure a model's heads (kvserve profile retrieval|moa|scorer MODEL)
  bench      put a server under load, or compare policies under the same load
  eval       measure what policies lose, and find the budget a model can bear

`kvserve COMMAND --help` shows examples.
"""

_BUDGETS = """\
Every policy takes a budget besides: NAME:budget=25% of the KV entries of the longest
request, or NAME:budget=512 tokens. Policies that free as they read (prefill=streaming)
take a range too: `kvserve serve --policy kvzap:budget=50%..12.5%` gives each request
the largest budget with which all that wait fit."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; mistakes of the user end in one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in _COMMANDS:
            known = ", ".join(_COMMANDS)
            raise UserError(f"{name}: no such command; choose one of {known}")
        share_threads()  # before torch is imported, which counts cores
        return _COMMANDS[name](rest)
    except UserError as error:
        print(f"kvserve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkvserve: stopped", file=sys.stderr)
        _end(_INTERRUPTED)


def _serve(argv: list[str]) -> int:
    from kvserve.start_up import be_quiet

    quiet = be_quiet(argv)
    # A thread of OpenBLAS, which the server has no use for, would keep it from forking.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What is imported stays: looking for garbage meanwhile takes a tenth of the time.
    gc.disable()
    from kvserve.http.serve import serve

    gc.freeze()
    gc.enable()
    try:
        code = serve(argv, quiet)
    finally:
        gc.unfreeze()  # or bindings list what a refused start leaves behind
    if quiet:
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    """End the process before bindings of its libraries list what they leak."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _plan(argv: list[str]) -> int:
    # A report of ten lines should not drown in vLLM's start-up log.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvserve.engine.start.capacity import plan

    return plan(argv)


def _profile(argv: list[str]) -> int:
    from kvserve.profiling import moa, retrieval, scorer

    parser = argparse.ArgumentParser(prog="kvserve profile")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    retrieval.add_arguments(
        kinds.add_parser("retrieval", help="find the heads that retrieve")
    )
    moa.add_arguments(kinds.add_parser("moa", help="find a span for every KV head"))
    scorer.add_arguments(
        kinds.add_parser("scorer", help="learn which tokens of a head are needed")
    )
    args = parser.parse_args(argv)
    runs = {"retrieval": retrieval.run, "moa": moa.run, "scorer": scorer.run}
    return runs[args.kind](args)


def _bench(argv: list[str]) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvserve.bench.command import bench

    return bench(argv)


def _eval(argv: list[str]) -> int:
    # Pages are counted in the scheduler, which therefore runs in this process; and a
    # progress bar should not drown in vLLM's start-up log.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvserve.evaluation.arguments import add_arguments
    from kvserve.evaluation.command import run

    parser = argparse.ArgumentParser(prog="kvserve eval")
    add_arguments(parser)
    return run(parser.parse_args(argv), argv)


def _policies(argv: list[str]) -> int:
    from policies.registry import available_policies

    argparse.ArgumentParser(
        prog="kvserve policies",
        description="List the cache policies.",
        epilog=_BUDGETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    for name, cls in available_policies().items():
        alias = "" if name == cls.name else f" (alias of {cls.name})"
        print(f"{name}{alias}")
        if alias:
            continue
        print(f"  {(cls.__doc__ or '').strip().splitlines()[0]}")
        print(f"  source: {cls.paper}")
        record = dataclasses.asdict(cls.capabilities)
        facts = (f"{key}={value}" for key, value in record.items() if value)
        print(f"  {', '.join(facts)}")
        for field in dataclasses.fields(cls):
            print(f"    {_parameter_line(field)}")
    print(f"\n{_BUDGETS}")
    return 0


def _parameter_line(field: dataclasses.Field[object]) -> str:
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    limits = f" ({low} to {high})" if high is not None else f" (at least {low})"
    default = "" if field.default is None else f" = {field.default}"
    return (
        f"{field.name}{default}{limits if low is not None else ''}: "
        f"{field.metadata['description']}"
    )


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "policies": _policies,
    "plan": _plan,
    "profile": _profile,
    "bench": _bench,
    "eval": _eval,
}

if __name__ == "__main__":
    sys.exit(main())
