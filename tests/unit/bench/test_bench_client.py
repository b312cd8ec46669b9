# SPDX-License-Identifier: Apache-2.0
"""What the benchmark counts of a server that fails some, and bundles tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvserve.bench.client import send
from kvserve.bench.result import Result
from kvserve.bench.scrape import Sample
from kvserve.bench.stream import Reply
from kvserve.bench.workloads import Request

_GAP = 0.1
_TIMELINE = [Sample(0, 0, 0, 0.0, 0), Sample(1, 0, 0, 0.0, 0)]


def _chunk(text: str | None, tokens: int) -> dict[str, Any]:
    delta = {"role": "assistant"} if text is None else {"content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": tokens}
    return {"choices": [{"index": 0, "delta": delta}], "usage": usage}


class _Server(BaseHTTPRequestHandler):
    """Does what the question says; eight tokens come as 1, then 3, then 4."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        kind = body["messages"][-1]["content"]
        if kind == "refuse":
            time.sleep(5 * _GAP)
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b"full")
            return
        self.send_response(200)
        self.end_headers()
        self._say(_chunk(None, 0))
        for text, tokens in (("a", 1), ("b c d", 4), ("e f g h", 8)):
            self._say(_chunk(text, tokens))
            time.sleep(_GAP)
            if kind == "break" and tokens == 4:
                return
            if kind == "fault" and tokens == 4:
                time.sleep(5 * _GAP)
                self._say({"error": {"message": "the engine gave up", "code": 500}})
                self.wfile.write(b"data: [DONE]\n\n")
                return
        usage = {"prompt_tokens": 7, "completion_tokens": 8}
        self._say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Server, "seen", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _asked(*kinds: str) -> list[Request]:
    return [Request(({"role": "user", "content": kind},), 8) for kind in kinds]


def test_failures_are_counted_and_measure_nothing(url: str) -> None:
    kinds = ("well", "refuse", "well", "break", "fault")
    measured = send(url, "m", _asked(*kinds), progress=False)
    result = Result.from_run("full", measured, _TIMELINE)
    assert (result.completed, result.failed) == (2, 3)
    assert measured["errors"][1] == "HTTP 503 full"
    assert measured["errors"][3] == "the stream broke off after 4 tokens"
    assert measured["errors"][4] == "the engine gave up"
    # What failed took half a second longer.
    assert result.ttft.p99 < 4 * _GAP
    assert result.itl.p99 < 2 * _GAP
    assert (result.prompt_tokens, result.output_tokens) == (14, 16)


def test_tokens_that_come_together_share_their_time(url: str) -> None:
    measured = send(url, "m", _asked("well"), progress=False)
    (gaps,) = measured["itls"]
    assert len(gaps) == 7
    assert gaps[:3] == pytest.approx([_GAP / 3] * 3, rel=0.5)
    assert gaps[3:] == pytest.approx([_GAP / 4] * 4, rel=0.5)
    assert measured["generated_texts"] == ["ab c de f g h"]
    (body,) = _Server.seen
    assert body["stream_options"]["continuous_usage_stats"]
    assert (body["max_completion_tokens"], body["ignore_eos"]) == (8, True)


def test_a_server_that_counts_no_chunks_gives_a_mean() -> None:
    reply = Reply()
    for now, text in ((1.0, ""), (1.0, "a"), (2.0, "b c d"), (3.0, "e")):
        reply.add({"choices": [{"delta": {"content": text}}]}, now)
    reply.add({"choices": [], "usage": {"completion_tokens": 5}}, 9.0)
    assert reply.end() == ""
    assert (reply.first, reply.last, reply.tokens) == (1.0, 3.0, 5)
    assert reply.gaps == [0.5] * 4


def test_tokens_that_come_with_the_first_have_no_gap() -> None:
    reply = Reply()
    for now, tokens in ((1.0, 3), (2.0, 5), (4.0, 5), (5.0, 6)):
        reply.add(_chunk("x", tokens), now)
    reply.add({"choices": [], "usage": {"completion_tokens": 6}}, 9.0)
    assert reply.end() == ""
    assert reply.gaps == [0.5, 0.5, 3.0]
    assert reply.last == 5.0


def test_a_reply_without_tokens_is_none() -> None:
    reply = Reply()
    reply.add(_chunk(None, 0), 1.0)
    reply.add({"choices": [], "usage": {"completion_tokens": 0}}, 2.0)
    assert reply.end() == "the reply has no token"
