# SPDX-License-Identifier: Apache-2.0
"""What vLLM does at every start though one would do, in a process that starts many.

Garbage collection took two thirds of the time of starting and closing a small engine:
vLLM collects nine times, and each time looked through all that was ever imported.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Leave what is there now to no collection until :func:`closing` ends.

    vLLM would do so with the engine too, and let it all go when the engine goes.
    """
    _register_kernels_once()
    gc.freeze()
    frozen_later = ("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker")
    with contextlib.ExitStack() as patches:
        for module in frozen_later:
            patches.enter_context(mock.patch(f"{module}.freeze_gc_heap"))
        yield


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Collect the engine alone; what was there before it is looked at again after."""
    with mock.patch("gc.unfreeze"):
        yield
    gc.unfreeze()


@functools.cache
def _register_kernels_once() -> None:
    """Put C++ in the place of Triton's kernels once: modules keep what was put there.

    vLLM looks for those kernels in every module, and would wrap its own wrappers.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = functools.cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(register)
