# SPDX-License-Identifier: Apache-2.0
"""vLLM's processes end when the one that started them does, however that ends.

An engine, or one of several API servers, is told to stop. A process that is killed
hard, by the system for its memory perhaps, tells nobody, and they would stay for good.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from vllm.v1 import utils
from vllm.v1.engine.core import EngineCoreProc

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_stock = EngineCoreProc.run_engine_core
_stock_api_server = utils.run_api_server_worker_proc


def watch_over_parents() -> None:
    """Have every process that vLLM starts from this one watch over it."""
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    utils.run_api_server_worker_proc = run_api_server


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """As vLLM's, the target of an engine process; found by name where it is spawned."""
    _watch_over_parent()
    _stock(*args, **kwargs)


def run_api_server(*args: Any, **kwargs: Any) -> None:
    """As vLLM's, the target of one of several API servers."""
    _watch_over_parent()
    _stock_api_server(*args, **kwargs)


def _watch_over_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        watch = threading.Thread(target=_end_after, args=(parent.pid,), daemon=True)
        watch.start()


def _end_after(parent: int) -> None:
    """End this process when it is no longer the child of ``parent``."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # in good order, if it still can
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
