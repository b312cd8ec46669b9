# SPDX-License-Identifier: Apache-2.0
"""When the engine may be a fork of its server, and what the fork lets go of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("vllm")


def run(program: str) -> str:
    """Run a program in a process of its own: this one has threads."""
    start = """
    import os, signal, socket, threading, time
    from kvserve.engine import fork
    from vllm.v1.engine import utils
    """
    text = textwrap.dedent(start) + textwrap.dedent(program)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_without_threads_forks_its_engine() -> None:
    found = run("""
    fork.let_engine_fork()
    print(utils.get_mp_context().get_start_method())
    """)
    assert found.split() == ["fork"]


def test_zeromqs_threads_do_not_matter_and_others_do() -> None:
    found = run("""
    import zmq
    context = zmq.Context()
    context.socket(zmq.ROUTER).bind("tcp://127.0.0.1:0")
    time.sleep(0.2)
    print(fork.threads_left_behind())
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    print(len(fork.threads_left_behind()))
    fork.let_engine_fork()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    print(utils.get_mp_context().get_start_method(), flush=True)
    os._exit(0)
    """)
    assert found.split() == ["[]", "1", "spawn"]


def test_the_thread_of_a_parallel_operator_is_seen() -> None:
    found = run("""
    import torch
    torch.set_num_threads(2)
    torch.ones(1 << 22).exp()
    print(len(fork.threads_left_behind()))
    """)
    assert found.split() == ["1"]


def test_a_fork_neither_listens_nor_wakes_its_servers_loop() -> None:
    found = run("""
    fork.let_engine_fork()
    server = socket.create_server(("127.0.0.1", 0))
    one, other = socket.socketpair()
    other.setblocking(False)
    signal.set_wakeup_fd(other.fileno())
    signal.signal(signal.SIGUSR1, lambda *_: None)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(3)
        os._exit(0)
    time.sleep(0.5)
    one.setblocking(False)
    try:
        print("woken", one.recv(1))
    except BlockingIOError:
        print("quiet")
    address = server.getsockname()
    server.close()
    try:
        socket.create_connection(address, timeout=1)
        print("listens")
    except OSError:
        print("closed")
    os.kill(child, 9)
    """)
    assert found.split() == ["quiet", "closed"]


def test_sockets_that_talk_are_kept() -> None:
    one, other = socket.socketpair()
    from kvserve.engine.fork import _listens

    with one, other, socket.create_server(("127.0.0.1", 0)) as server:
        assert not _listens(one.fileno())
        assert _listens(server.fileno())
