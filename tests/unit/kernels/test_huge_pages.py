# SPDX-License-Identifier: Apache-2.0
"""The hint reaches the system, and what cannot have large pages is left alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from kvserve.kernels.huge_pages import use_huge_pages


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_the_system_is_told() -> None:
    memory = torch.zeros(16 << 20, dtype=torch.int8)
    assert use_huge_pages(memory)
    middle = memory.data_ptr() + memory.nbytes // 2
    assert "hg" in flags_at(middle)


def test_less_than_a_page_is_left_alone() -> None:
    assert not use_huge_pages(torch.zeros(1))


def flags_at(address: int) -> list[str]:
    """What the system notes of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")
