# SPDX-License-Identifier: Apache-2.0
"""Control groups of the system that grant a share of its cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_PERIOD = 100_000
_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def quota_group(quota: float) -> Iterator[Path]:
    """A control group of the system that grants ``quota`` cores."""
    version_1 = _ROOT / "cpu"
    parent = version_1 if version_1.is_dir() else _ROOT
    group = parent / f"kvserve-test-{os.getpid()}"
    try:
        if parent is _ROOT:
            (parent / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    time = int(quota * _PERIOD)
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{time} {_PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(time))
        yield group
    finally:
        group.rmdir()


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` in a group."""
    shell = 'echo $$ > "$0" && exec "$@"'
    return ["sh", "-c", shell, str(group / "cgroup.procs"), *command]
