# SPDX-License-Identifier: Apache-2.0
"""What compression itself costs a worker, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall time; on a device that computes on its own, time to launch.

    Attributes:
        selection: seconds spent on choosing what survives.
        compaction: seconds spent on moving what does.
    """

    def __init__(self) -> None:
        self.selection = 0.0
        self.compaction = 0.0

    @contextmanager
    def selecting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.selection += time.perf_counter() - start

    @contextmanager
    def compacting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.compaction += time.perf_counter() - start
