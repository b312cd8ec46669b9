# SPDX-License-Identifier: Apache-2.0
"""Large pages of virtual memory for the pool, on Linux.

Head pages lie anywhere in the pool, so with small pages of memory nearly each of them
costs a walk through the system's page tables.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor


def use_huge_pages(memory: Tensor) -> bool:
    """Ask for huge pages under memory that has not been written to yet.

    Returns:
        Whether the system took the hint; it is free to ignore it.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or memory.device.type != "cpu":
        return False
    size = mmap.PAGESIZE
    first = -(-memory.data_ptr() // size) * size
    last = (memory.data_ptr() + memory.nbytes) // size * size
    if last <= first:
        return False
    arguments = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    failed: int = ctypes.CDLL(None).madvise(*arguments, mmap.MADV_HUGEPAGE)
    return not failed
