# SPDX-License-Identifier: Apache-2.0
"""The engine as a fork of the server, which has imported all that the engine needs.

On CPUs vLLM spawns it, which imports vLLM a second time: some ten seconds of every
start. A fork takes over the memory of a process but none of its threads, so it is safe
only where no other thread may hold a lock, or belong to a pool that the engine would
wait for: OpenMP's above all.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine import utils

from kvserve.start_up import WATCHER

logger = init_logger(__name__)
_TASKS = Path("/proc/self/task")
_HARMLESS = "ZMQbg"
"""How the names of threads begin that a fork may leave behind: ZeroMQ's. The engine
makes a context of its own."""
_NAMED_WITHIN = 0.2


def let_engine_fork() -> None:
    """Have vLLM fork its engine from this process, if it still can by then."""
    if not (current_platform.is_cpu() and _TASKS.is_dir()):
        return
    names = vars(utils)
    stock: Callable[[], BaseContext] = names["get_mp_context"]

    @functools.cache  # a queue and the process that gets it must be of one kind
    def context() -> BaseContext:
        end = time.monotonic() + _NAMED_WITHIN
        while left := threads_left_behind():
            if time.monotonic() > end:
                logger.info("spawning the engine, as threads run here: %s", left)
                return stock()
            time.sleep(_NAMED_WITHIN / 10)  # a new thread has yet to say its name
        return multiprocessing.get_context("fork")

    names["get_mp_context"] = context
    os.register_at_fork(after_in_child=_part)


def _part() -> None:
    """Let go, in a fork, of what is the server's: its signals and where it listens."""
    # Python tells an event loop of signals through a pipe, which both would share.
    signal.set_wakeup_fd(-1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if _awaits_peers(int(name)):
                # Not closed: its number would be taken, and closed by the old owner.
                os.dup2(nothing, int(name))
    os.close(nothing)


def _awaits_peers(descriptor: int) -> bool:
    """Tell whether it is a server's socket: it has a name, and nobody at the other end.

    The server binds its own before there is an engine, and listens after.
    """
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as found:
        if found.type != socket.SOCK_STREAM:
            return False
        try:
            found.getpeername()
        except OSError:
            name = found.getsockname()
            return bool(name[1] if isinstance(name, tuple) else name)
        return False


def threads_left_behind() -> list[str]:
    """Name the threads of this process that a fork would lack, and might miss.

    Not counted: the one that asks, and the one that shows progress, which lets go of
    its lock for a fork (``start_up``).
    """
    ours = {t.native_id for t in threading.enumerate() if t.name == WATCHER}
    ours.add(threading.get_native_id())
    names = [_name(task) for task in _TASKS.iterdir() if int(task.name) not in ours]
    return [name for name in names if not name.startswith(_HARMLESS)]


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has ended
        return _HARMLESS
