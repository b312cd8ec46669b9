# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows of a start that is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "nope"], "--policy nope: unknown"),
        (["-O2"], "PyTorch is to compile the model, and there is no C++ compiler"),
        pytest.param(
            ["--policy", "none"],
            "PyTorch is to compile the model, and there is no C++",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_reason_is_one_line_and_the_last(flags: list[str], said: str) -> None:
    """Bindings of libraries list what they leak when a process ends."""
    run = "import sys; from kvserve.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", run, "serve", *flags],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"kvserve: error: {said}")
    assert not [line for line in before if "error" in line]
