# SPDX-License-Identifier: Apache-2.0
"""Threads stay within the cores that are visible and within a container's quota."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvserve import cores
from kvserve.cores import Cores, cpu_quota, quota_of
from tests.control_groups import inside, quota_group


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 200000\n"}, 0.25),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu.max": "100000 0\n"}, None),
        ({}, None),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.cfs_quota_us": "400000\n"}, None),
    ],
    ids=str,
)
def test_a_group_says_how_many_cores_it_grants(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert quota_of(tmp_path) == expected


class Machine:
    """The files of a process and of its control groups, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.mount = folder / "proc", folder / "cgroup"
        self.proc.mkdir()
        self.mount.mkdir()

    def says(self, groups: str, kind: str, root: str = "/") -> float | None:
        (self.proc / "cgroup").write_text(groups)
        (self.proc / "mountinfo").write_text(
            "21 1 0:20 / / rw shared:1 - ext4 /dev/vda rw\n"
            f"42 41 0:39 {root} {self.mount} rw,nosuid shared:9 master:3 - {kind}\n"
        )
        return cpu_quota(self.proc)

    def limit(self, group: str, text: str) -> None:
        folder = self.mount / group
        folder.mkdir(parents=True, exist_ok=True)
        quota, period = text.split()
        (folder / "cpu.max").write_text(text)
        (folder / "cpu.cfs_quota_us").write_text(quota)
        (folder / "cpu.cfs_period_us").write_text(period)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_least_of_nested_groups_counts(machine: Machine) -> None:
    machine.limit("pod", "150000 100000")
    machine.limit("pod/container", "400000 100000")
    machine.limit("pod/container/own", "max 100000")
    groups = "0::/pod/container/own\n"
    assert machine.says(groups, "cgroup2 cgroup2 rw,nsdelegate") == 1.5


def test_a_container_sees_its_group_as_the_root(machine: Machine) -> None:
    machine.limit("", "200000 100000")
    assert machine.says("0::/\n", "cgroup2 cgroup rw") == 2.0


def test_the_controller_is_found_among_those_of_version_1(machine: Machine) -> None:
    machine.limit("a/b", "250000 100000")
    (machine.mount / "a/b/cpu.max").unlink()
    groups = "9:memory:/elsewhere\n4:cpu,cpuacct:/a/b\n0::/\n"
    assert machine.says(groups, "cgroup cgroup rw,cpu,cpuacct") == 2.5
    assert machine.says(groups, "cgroup cgroup rw,memory") is None


@pytest.mark.parametrize("group", ["/docker/1234", "/docker/1234/own", "/other"])
def test_a_path_of_the_host_is_found_below_the_mounts_root(
    group: str, machine: Machine
) -> None:
    machine.limit("", "300000 100000")
    (machine.mount / "cpu.max").unlink()
    groups = f"4:cpu,cpuacct:{group}\n"
    assert machine.says(groups, "cgroup cgroup rw,cpu", root="/docker/1234") == 3.0


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cgroup").write_text("")
    (tmp_path / "mountinfo").write_text("21 1 0:20 / / rw - ext4 /dev/vda rw\n")
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("visible", "quota", "workers", "threads"),
    [
        (8, None, 1, 8),
        (8, None, 3, 2),
        (8, 2.0, 1, 2),
        (8, 2.9, 1, 2),
        (8, 4.0, 2, 2),
        (8, 0.5, 1, 1),
        (8, 2.0, 4, 1),
        (2, 16.0, 1, 2),
    ],
)
@pytest.mark.parametrize("asked", ["", "1", "64", "2,1"])
def test_workers_and_threads_stay_within_the_quota(
    visible: int,
    quota: float | None,
    workers: int,
    threads: int,
    asked: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "_ASKED", asked.partition(",")[0])
    found = Cores(tuple(range(visible)), quota)
    most = int(asked.partition(",")[0] or 99)
    assert found.threads(workers) == min(threads, most)


def test_it_says_what_runs_on_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_ASKED", "")
    eight = tuple(range(8))
    assert Cores(eight, None).describe(1) == "1 worker x 8 threads on 8 cores"
    assert Cores((3,), None).describe(1) == "1 worker x 1 thread on 1 core"
    assert Cores(eight, 2.5).describe(2) == (
        "2 workers x 1 thread on 2 of 8 cores: the CPU quota is 2.5"
    )


_PLAIN = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
_PROBE = """
import os, kvserve.cores
quota = kvserve.cores.cpu_quota()
threads = kvserve.cores.share_threads(int(os.environ["WORKERS"]))
import torch
print(quota, threads, torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("quota", "workers", "said"),
    [(1.0, 1, "1.0 1 1"), (2.0, 2, "2.0 1 1"), (0.5, 1, "0.5 1 1")],
)
def test_a_process_in_a_real_group_keeps_to_its_quota(
    quota: float, workers: int, said: str
) -> None:
    # Engines of other tests leave settings of threads in this process's environment.
    plain = {name: os.environ[name] for name in _PLAIN if name in os.environ}
    environment = plain | {"WORKERS": str(workers)}
    with quota_group(quota) as group:
        found = subprocess.run(
            inside(group, [sys.executable, "-c", _PROBE]),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    assert found.stdout.strip() == said
