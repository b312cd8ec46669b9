# SPDX-License-Identifier: Apache-2.0
"""``kvserve bench``: the same load on one server, or on one policy after another."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.bench.loads import Load, add_load_arguments, load_of
from kvserve.bench.result import write_json
from kvserve.bench.scrape import Sampler, get
from kvserve.bench.server import running_server
from kvserve.bench.workloads import write_workload
from kvserve.cores import Cores
from kvserve.errors import UserError
from kvserve.models import add_model
from kvserve.units import parse_bytes
from kvserve.version import __version__
from policies.budgets import PolicySpec, split_policies
from policies.registry import STOCK

_COMPILING = (
    *("-O", "--optimization-level", "--enforce-eager"),
    *("-cc", "--compilation-config"),
)
_EXAMPLES = """examples:
  kvserve bench                                  the embedded model, its default policy
  kvserve bench --url http://127.0.0.1:8000      a server that runs already
  kvserve bench --compare none,full,retrieval --workload long-document \\
    --kv-memory 256MiB --image bench.png --json bench.json
  kvserve bench --compare none,h2o:budget=25%,norm=count -- --max-model-len 4096
  kvserve bench --policy retrieval:budget=25% --policy snapkv:budget=25%
  kvserve bench --workload my.jsonl --rate 2 --concurrency 8
  kvserve bench --workload agents --agents 16 --turns 8 --kv-memory 256MiB \\
    --compare none,retrieval:budget=25%,kvzap:budget=12.5%

What follows `--` goes to every `kvserve serve` that is started. A workload file has a
line a request: {"prompt": "...", "output_tokens": 64}, or "messages" instead of the
prompt; or a line an agent: {"system": "...", "turns": [{"user": "...",
"output_tokens": 64, "think": 1.5}]}. A server that wants a key gets OPENAI_API_KEY.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``kvserve bench``."""
    parser = argparse.ArgumentParser(
        prog="kvserve bench",
        description="Put a server under load with vLLM's benchmark client.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--url", help="use the server at this address; starts none")
    target.add_argument(
        "--compare",
        metavar="POLICY,...",
        help="start a server for each policy in turn, `none` for stock vLLM; a policy "
        "is NAME[:KEY=VALUE,...] or a TOML file, as `kvserve serve --policy` takes it",
    )
    target.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="one policy of --compare; may be given several times",
    )
    parser.add_argument(
        "--kv-memory",
        default="512MiB",
        help="KV cache of a server that is started (default: %(default)s)",
    )
    add_load_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--image", type=Path, metavar="FILE.png", help="draw it")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    output.add_argument(
        "--write-workload",
        type=Path,
        metavar="FILE.jsonl",
        help="write the requests as a workload file, and send nothing",
    )
    return parser


def bench(argv: list[str]) -> int:
    """Run the benchmark; 1 if a request failed."""
    own, server_flags = _split(argv)
    args = make_parser().parse_args(own)
    _check(args, server_flags)
    load = load_of(args)
    if args.write_workload:
        write_workload(args.write_workload, load.entries)
        return 0
    results = list(_results(args, server_flags, load))
    title = _title(args, load, results)
    print(f"\n### {title}\n\n{load.shown.table(results)}")
    if args.json:
        write_json(args.json, _about(args, server_flags), results)
    if args.image:
        load.shown.draw(args.image, title, results)
    for result in results:
        if result.failed:
            print(
                f"kvserve: {result.policy}: {result.failed} requests failed, the first "
                f"with: {result.first_error}",
                file=sys.stderr,
            )
    return int(any(result.failed for result in results))


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _check(args: argparse.Namespace, server_flags: list[str]) -> None:
    if args.url and server_flags:
        raise UserError("--url: takes no server flags after `--`: it starts no server")
    if args.url and args.model:
        raise UserError("--url: serves the model it serves; leave the model out")
    parse_bytes(args.kv_memory, "--kv-memory")
    for policy in named_policies(args):
        if policy != "none":
            PolicySpec.parse(policy)
    for name in ("image", "json", "write_workload"):
        path = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {path}: no such folder: {path.parent}")


def _results(args: argparse.Namespace, further: list[str], load: Load) -> list[Any]:
    if args.url:
        return [measure(args.url.rstrip("/"), args.url, load)]
    policies = named_policies(args) or [""]
    log = Path(tempfile.mkstemp(prefix="kvserve-bench-", suffix=".log")[1])
    print(f"kvserve: the servers' log is {log}", file=sys.stderr)
    further = [*compiled_alike(policies, further), *further]
    results = []
    for policy in tqdm(policies, desc="policies", disable=len(policies) == 1):
        flags = [*flags_of(args, policy), *further]
        with running_server(flags, log) as base_url:
            results.append(measure(base_url, policy or "default policy", load))
    return results


def named_policies(args: argparse.Namespace) -> list[str]:
    """The policies that were named, in their order."""
    return split_policies(args.compare) if args.compare else args.policy or []


def compiled_alike(policies: list[str], further: list[str]) -> list[str]:
    """Flags that have every server compiled where one of them is stock vLLM, which is.

    Args:
        further: flags of the user's, who may have said it himself.
    """
    told = any(flag.startswith(_COMPILING) for flag in further)
    return [] if told or STOCK not in policies else ["-O2"]


def flags_of(args: argparse.Namespace, policy: str) -> list[str]:
    """Flags of ``kvserve serve`` for a policy, or for its default."""
    size = parse_bytes(args.kv_memory, "--kv-memory")
    flags = [args.model] if args.model else []
    flags += ["--kv-cache-memory-bytes", str(size)]
    return [*flags, "--policy", policy] if policy else flags


def measure(base_url: str, label: str, load: Load) -> Any:
    """Warm one server up, put it under load and watch its metrics.

    Raises:
        UserError: no server answers, or it is not one of vLLM's.
    """
    model = _served_model(base_url)
    from kvserve.bench.client import send

    send(base_url, model, [load.warm_up], progress=False)
    try:
        with Sampler(base_url) as sampler:
            measured = load.send(base_url, model)
    except KeyError as error:
        raise UserError(
            f"{base_url}/metrics: has no {error.args[0]}; is this a vLLM server?"
        ) from None
    except OSError as error:
        raise UserError(f"{base_url}/metrics: cannot be read ({error})") from None
    return load.result(label, measured, sampler.samples)


def _served_model(base_url: str) -> str:
    try:
        models = json.loads(get(f"{base_url}/v1/models"))
        return str(models["data"][0]["id"])
    except urllib.error.HTTPError as error:
        hint = "; set OPENAI_API_KEY" if error.code == 401 else ""
        raise UserError(f"--url {base_url}: answers {error.code}{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--url {base_url}: no server answers ({error}); start one with `kvserve "
            "serve`, or leave --url out"
        ) from None
    except (LookupError, TypeError):
        raise UserError(f"--url {base_url}: its /v1/models lists no model") from None


def _title(args: argparse.Namespace, load: Load, results: Sequence[Any]) -> str:
    memory = "" if args.url else f", {args.kv_memory} of KV cache"
    return f"{load.title(results)}{memory}"


def _about(args: argparse.Namespace, server_flags: list[str]) -> dict[str, Any]:
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("json", "image", "write_workload")
    }
    return {
        "kvserve": __version__,
        "settings": settings,
        "server_flags": server_flags,
        "cores": Cores.of_this_process().count,
    }
