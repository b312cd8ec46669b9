# SPDX-License-Identifier: Apache-2.0
"""How many cores this process may use: those it sees, and no more than its quota.

A container's limit of CPUs hides no core. It is a share of time, kept in the files of
its control group, and threads beyond it only make each other wait. Knows no vLLM.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_V2_LIMIT = "cpu.max"
_V1_LIMIT = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
_THREADS = "OMP_NUM_THREADS"
_ASKED = os.environ.get(_THREADS, "").partition(",")[0].strip()
"""What the user set, before this process set it for those that it starts."""


@dataclass(frozen=True)
class Cores:
    """Cores for all threads of this process and its children.

    Attributes:
        visible: ids of the cores that it may run on, ascending.
        quota: cores' worth of time that its control groups grant; ``None``: no limit.
    """

    visible: tuple[int, ...]
    quota: float | None

    @classmethod
    def of_this_process(cls) -> Cores:
        return cls(tuple(sorted(os.sched_getaffinity(0))), cpu_quota())

    @property
    def is_cut(self) -> bool:
        """Whether the quota, not what is visible, is the limit."""
        return self.quota is not None and self.quota < len(self.visible)

    @property
    def count(self) -> int:
        """Threads that may run at once: whole cores within the quota, at least one."""
        if self.quota is None:
            return len(self.visible)
        return min(len(self.visible), max(int(self.quota), 1))

    def threads(self, workers: int) -> int:
        """Threads for each of ``workers`` processes: no more than its share."""
        share = max(self.count // workers, 1)
        asked = int(_ASKED) if _ASKED.isdecimal() else 0
        return min(share, asked or share)

    def describe(self, workers: int) -> str:
        """Say what runs on what: ``2 workers x 1 thread on 2 of 8 cores (...)``."""
        threads = self.threads(workers)
        found = f"{_plural(workers, 'worker')} x {_plural(threads, 'thread')} on "
        if not self.is_cut:
            return found + _plural(self.count, "core")
        seen = _plural(len(self.visible), "core")
        return found + f"{self.count} of {seen}: the CPU quota is {self.quota:g}"


def share_threads(workers: int = 1) -> int:
    """Give each of ``workers`` processes its share of the cores; return how many.

    For processes yet to be started, and for what this one has not yet loaded: OpenMP
    reads the environment once.
    """
    cores = Cores.of_this_process()
    threads = cores.threads(workers)
    os.environ[_THREADS] = str(threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores.count))  # tokenizers
    return threads


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """Read the CPU quota of the control groups above this process, in cores.

    Of both versions; where groups are nested the least counts.

    Args:
        proc: folder of a process, with ``cgroup`` and ``mountinfo``.

    Returns:
        ``None`` if there is no limit, or no control groups.
    """
    try:
        groups = _groups((proc / "cgroup").read_text())
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    quotas = [
        quota
        for line in mounts
        if (place := _place(line, groups)) is not None
        for folder in _upwards(*place)
        if (quota := quota_of(folder)) is not None
    ]
    return min(quotas, default=None)


def quota_of(folder: Path) -> float | None:
    """Read the quota of one control group, in cores; ``None``: it sets no limit."""
    try:
        if (folder / _V2_LIMIT).exists():
            quota, period = (folder / _V2_LIMIT).read_text().split()
        else:
            quota, period = ((folder / name).read_text() for name in _V1_LIMIT)
        # "max" of version 2 and -1 of version 1 are no limit.
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _groups(text: str) -> dict[str, str]:
    """The process's group under the controller ``cpu``, and in version 2 (``""``)."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = path
    return {name: path for name, path in found.items() if name in ("cpu", "")}


def _place(mount: str, groups: dict[str, str]) -> tuple[Path, Path] | None:
    """Where a mount shows the process's group: the mount point, and the group in it."""
    fields, _, kind = mount.partition(" - ")
    name, options = kind.partition(" ")[0], kind.rpartition(" ")[2].split(",")
    controller = {"cgroup2": "", "cgroup": "cpu"}.get(name)
    if controller not in groups or (controller and controller not in options):
        return None
    root, point = fields.split(" ")[3:5]
    top, group = Path(point), Path(groups[controller])
    # A container may see its group as a mount's root, under a path of the host.
    below = group.relative_to(root) if group.is_relative_to(root) else Path()
    return top, top / below


def _upwards(top: Path, group: Path) -> list[Path]:
    """The group and those above it, as far as they can be seen."""
    above = [folder for folder in group.parents if folder.is_relative_to(top)]
    return [group, *above]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
