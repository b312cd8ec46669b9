# SPDX-License-Identifier: Apache-2.0
"""What a start shows: silence until asked, and where the server is once it answers."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvserve import start_up
from kvserve.errors import UserError
from kvserve.start_up import Address, Phase, Progress, be_quiet, enter, tell_capacity


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[Address]:
    """Where a healthy server listens."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Address("127.0.0.1", server.server_address[1])
    server.shutdown()
    server.server_close()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("plain")
class TestQuiet:
    def test_nobody_asked_for_a_log(self) -> None:
        assert be_quiet(["--port", "1"])
        assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"

    def test_verbose_leaves_everything_as_it_is(self) -> None:
        assert not be_quiet(["--verbose"])
        assert "VLLM_LOGGING_LEVEL" not in os.environ
        assert "PYTHONWARNINGS" not in os.environ

    def test_a_level_that_was_set_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        assert not be_quiet([])
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        (None, False, "http://127.0.0.1:80"),
        ("0.0.0.0", True, "https://127.0.0.1:80"),
        ("::", False, "http://[::1]:80"),
        ("box", False, "http://box:80"),
    ],
)
def test_an_address_can_be_asked(host: str | None, tls: bool, url: str) -> None:
    assert Address.of(host, 80, tls).url == url


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(
    address: Address,
) -> None:
    with pytest.raises(UserError, match=f"--port {address.port}: something listens"):
        address.check_free()


def test_a_free_port_is_fine() -> None:
    Address("127.0.0.1", 1).check_free()


def test_the_block_comes_once_the_server_is_healthy(
    address: Address, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_Health, "status", 503)
    monkeypatch.setattr(start_up, "_capacity", [])
    Progress(address, "tiny", ["full: keeps everything"]).start()
    time.sleep(0.6)
    assert "ready" not in capfd.readouterr().err
    tell_capacity("1 GiB hold 28 requests")
    monkeypatch.setattr(_Health, "status", 200)
    shown, end = "", time.monotonic() + 20
    while "Ctrl-C" not in shown and time.monotonic() < end:
        time.sleep(0.05)
        shown += capfd.readouterr().err
    assert f"kvserve is ready on {address.url}" in shown
    assert "policy     full: keeps everything" in shown
    assert "KV cache   1 GiB hold 28 requests" in shown
    assert '"model": "tiny"' in shown
    assert f"{address.url}/dashboard" in shown


def test_a_forked_engine_says_what_it_does() -> None:
    child = os.fork()
    if child == 0:
        enter(Phase.WARMING)
        os._exit(0)
    os.waitpid(child, 0)
    try:
        assert Phase(start_up._phase[0]) is Phase.WARMING
    finally:
        enter(Phase.STARTING)
