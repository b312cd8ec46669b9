# SPDX-License-Identifier: Apache-2.0
"""When the engine may be a fork of its server, and what the fork lets go of."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvserve.engine.start.fork import _awaits_peers

PROGRAM = """
import json, os, signal, socket, threading, time
import torch, zmq
from kvserve.engine.start import fork
from vllm.v1.engine import utils

os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
fork.let_engine_fork()

def apart(case):
    "What a case finds in a process of its own, which threads of others do not reach."
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write, json.dumps(case()).encode())
        finally:
            os._exit(0)
    os.close(write)
    return json.loads(os.read(read, 1 << 16) or "null")

def alone():
    return utils.get_mp_context().get_start_method()

def zeromq():
    zmq.Context().socket(zmq.ROUTER).bind("tcp://127.0.0.1:0")
    return utils.get_mp_context().get_start_method()

def thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return utils.get_mp_context().get_start_method()

def operator():
    torch.set_num_threads(2)
    torch.ones(1 << 22).exp()
    return utils.get_mp_context().get_start_method()

server = socket.create_server(("127.0.0.1", 0))
one, other = socket.socketpair()
one.setblocking(False)
other.setblocking(False)
signal.set_wakeup_fd(other.fileno())
signal.signal(signal.SIGUSR1, lambda *_: None)

def signalled():
    os.kill(os.getpid(), signal.SIGUSR1)
    return True

def woken():
    try:
        return len(one.recv(1))
    except BlockingIOError:
        return 0

def listens():
    try:
        return server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        return 0

found = {case.__name__: apart(case) for case in (alone, zeromq, thread, operator)}
found["signalled"] = apart(signalled)
found["woken"] = woken()
found["listens"] = listens(), apart(listens)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    """What a process of its own finds, since this one has threads."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "method"),
    [("alone", "fork"), ("zeromq", "fork"), ("thread", "spawn"), ("operator", "spawn")],
)
def test_only_threads_that_an_engine_would_miss_keep_it_from_forking(
    found: Any, case: str, method: str
) -> None:
    assert found[case] == method


def test_a_signal_to_a_fork_does_not_wake_its_servers_loop(found: Any) -> None:
    assert found["signalled"]
    assert found["woken"] == 0


def test_a_fork_does_not_listen_for_its_server(found: Any) -> None:
    assert found["listens"] == [1, 0]


def test_sockets_that_talk_are_kept() -> None:
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as server:
        assert not _awaits_peers(one.fileno())
        assert _awaits_peers(server.fileno())
        with socket.create_connection(server.getsockname()) as client:
            assert not _awaits_peers(client.fileno())


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_a_socket_that_is_yet_to_listen_is_let_go(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    """As vLLM's server has it while its engine starts."""
    names = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}
    with socket.socket(family) as server:
        assert not _awaits_peers(server.fileno())
        server.bind(names.get(family, str(tmp_path / "socket")))
        assert _awaits_peers(server.fileno())
