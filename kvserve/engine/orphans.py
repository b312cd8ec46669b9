# SPDX-License-Identifier: Apache-2.0
"""An engine ends when the process that started it does, however that ends.

vLLM's engine is told to stop by its server. One that is killed hard, by the system for
its memory perhaps, tells nobody, and the engine would keep its own for good.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from vllm.v1.engine.core import EngineCoreProc

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_stock = EngineCoreProc.run_engine_core


def let_engines_end() -> None:
    """Have every engine process that this one starts watch over it."""
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """As vLLM's, the target of an engine process; found by name where it is spawned."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        watch = threading.Thread(target=_end_after, args=(parent.pid,), daemon=True)
        watch.start()
    _stock(*args, **kwargs)


def _end_after(parent: int) -> None:
    """End this process when it is no longer the child of ``parent``."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # in good order, if it still can
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
