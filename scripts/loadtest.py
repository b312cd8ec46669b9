# SPDX-License-Identifier: Apache-2.0
"""Load a kvserve server with guidellm, then with agents; write a report of each.

make loadtest                                    # starts a server
make loadtest URL=http://127.0.0.1:8000          # uses one that runs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvserve.bench.command import bench
from kvserve.bench.scrape import get
from kvserve.bench.server import running_server
from kvserve.bench.workloads import WORKLOADS, draw_workload, write_workload
from kvserve.errors import UserError

# vLLM's own name of what guidellm calls output_tokens_count.
_COLUMNS = {"text_column": "prompt", "output_tokens_count_column": "output_tokens"}
_SINGLE_QUESTIONS = [name for name in WORKLOADS if name != "chat"]


def main() -> int:
    """Run guidellm once for every number of streams, and agents after it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="a server that runs; default: start one")
    parser.add_argument(
        "--workload", choices=_SINGLE_QUESTIONS, default="long-document"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1200)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--requests", type=int, default=8, help="for each of --streams")
    parser.add_argument("--streams", default="1,4", help="requests at a time, in turn")
    parser.add_argument("--output", type=Path, default=Path("loadtest.html"))
    parser.add_argument("--guidellm", default=".venv-load/bin/guidellm")
    parser.add_argument("--agents", type=int, default=4, help="of 4 turns; 0: none")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as name, _server(args.url) as url:
            return _run(args, url, Path(name)) or _run_agents(args, url)
    except UserError as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url:
        yield url.rstrip("/")
        return
    log = Path(tempfile.mkstemp(prefix="kvserve-loadtest-", suffix=".log")[1])
    print(f"loadtest: starting a server; its log is {log}", file=sys.stderr)
    with running_server(["--kv-cache-memory-bytes", "512M"], log) as started:
        yield started


def _run(args: argparse.Namespace, url: str, folder: Path) -> int:
    workload = folder / "workload.jsonl"
    count = args.requests * len(args.streams.split(","))
    requests = draw_workload(
        args.workload, count, 0, args.prompt_tokens, args.output_tokens
    )
    write_workload(workload, requests)
    mapper = {"kind": "generative_column_mapper", "column_mappings": _COLUMNS}
    backend = {"kind": "openai_http", "target": url}
    if key := os.environ.get("OPENAI_API_KEY"):
        backend["api_key"] = key
    command = [args.guidellm, "run"]
    command += ["--backend", json.dumps(backend)]
    command += ["--tokenizer", f"kind=huggingface_auto,model={_tokenizer(url)}"]
    command += ["--data", f"kind=json_file,path={workload}"]
    command += ["--data-column-mapper", json.dumps(mapper)]
    command += ["--profile", "kind=concurrent,streams=1"]
    command += ["--override", "profile.streams", args.streams]
    command += ["--constraint", f"kind=max_requests,count={args.requests}"]
    command += ["--output", f"kind=html,path={args.output}"]
    command += ["--output", "kind=console"]
    return subprocess.run(command, check=False).returncode


def _run_agents(args: argparse.Namespace, url: str) -> int:
    """Have agents talk to the server, and draw how they fared."""
    if not args.agents:
        return 0
    image = args.output.with_name(f"{args.output.stem}-agents.png")
    load = ["--workload", "agents", "--agents", str(args.agents), "--turns", "4"]
    load += ["--shared-tokens", str(args.prompt_tokens // 2)]
    load += ["--prompt-tokens", str(args.prompt_tokens // 8)]
    load += ["--output-tokens", str(args.output_tokens)]
    return bench(["--url", url, *load, "--image", str(image)])


def _tokenizer(url: str) -> str:
    """What the server itself loaded: a directory here, or a name on the hub."""
    try:
        return str(json.loads(get(f"{url}/v1/models"))["data"][0]["root"])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"--url {url}: its models cannot be read ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
