# SPDX-License-Identifier: Apache-2.0
"""Where deploy/ is, and the tools that check it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

Tool = Callable[..., str]


def find_tool(name: str) -> str:
    """Find a program next to our Python, or on the path; skip where it is not.

    Where KVSERVE_REQUIRE_TOOLS is set, as in CI, a tool that is missing is a failure.
    """
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    if found:
        return found
    if os.environ.get("KVSERVE_REQUIRE_TOOLS"):
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed (`apt-get install prometheus` for promtool)")


def run_tool(name: str, *arguments: str | Path, **environment: str) -> str:
    """Run a tool that must succeed; return what it printed on stdout."""
    done = subprocess.run(
        [find_tool(name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(Path.home()), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def serve_parser() -> Callable[[list[str]], Any]:
    """Parse flags as `kvserve serve` does; a flag that it lacks is an error."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvserve.http.serve import add_policy_arguments

    parser = FlexibleArgumentParser()
    add_policy_arguments(make_arg_parser(parser))
    return parser.parse_args
