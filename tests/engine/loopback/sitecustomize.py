# SPDX-License-Identifier: Apache-2.0
"""On the path of a Python process, and of all that it starts: no network but loopback.

What is tried all the same fails, and is written to the file that the environment names.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

_TRIED = os.environ["KVSERVE_TEST_TRIED"]
_INTERNET = (socket.AF_INET, socket.AF_INET6)
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    return name in ("", "localhost", "::", "::1", "0.0.0.0") or name.startswith("127.")


def _note(what: object) -> None:
    with open(_TRIED, "a") as file:
        file.write(f"{what} by {' '.join(sys.argv)}\n")


def connect(self: socket.socket, address: Any) -> None:
    # A datagram socket that is connected sends nothing yet.
    sends = self.family in _INTERNET and self.type & socket.SOCK_STREAM
    if sends and not _is_local(address[0]):
        _note(address)
        raise OSError(101, "Network is unreachable")
    _connect(self, address)


def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
    if not _is_local(host) and host != socket.gethostname():
        _note(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    return _getaddrinfo(host, *args, **options)


socket.socket.connect = connect  # type: ignore[method-assign]
socket.getaddrinfo = getaddrinfo
