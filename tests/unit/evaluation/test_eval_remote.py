# SPDX-License-Identifier: Apache-2.0
"""Measuring a server, with one that answers as vLLM does."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvserve.errors import UserError
from kvserve.evaluation.backend import Pages, Request
from kvserve.evaluation.contenders import ServerContender
from kvserve.evaluation.model import EvaluatedModel
from kvserve.extra_args import FORCED_TOKENS
from policies.base import ModelShape
from tests.unit.byte_tokenizer import byte_tokenizer


class FakeServer(ThreadingHTTPServer):
    """Continues every prompt with ``says``; ``obeys`` forced tokens, or does not."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokenizer = byte_tokenizer()
        self.says, self.obeys, self.status = "yes\nno", True, 200
        self.has_books = False
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        forced = body.get("vllm_xargs", {}).get(FORCED_TOKENS, [])
        token_ids = (forced if self.obeys else [1] * len(forced)) + self.tokenizer(
            self.says, add_special_tokens=False
        )["input_ids"]
        token_ids = token_ids[: body["max_tokens"]]
        choice: dict[str, Any] = {"text": self.says, "token_ids": token_ids}
        if body.get("logprobs") is not None:
            tops = [{f"token_id:{t}": -0.5, "token_id:9": -2.0} for t in token_ids]
            choice["logprobs"] = {
                "token_logprobs": [-0.5] * len(token_ids),
                "top_logprobs": tops,
            }
        return {"id": f"cmpl-{len(self.bodies)}", "choices": [choice]}

    def books(self, path: str) -> dict[str, Any] | None:
        """What a server of kvserve says of its pool; stock vLLM has no such routes."""
        if not self.has_books:
            return None
        if path.startswith("/v1/kv/plan"):
            return {"pages": 90, "bytes": 90 * 8192}
        if path.startswith("/v1/kv/receipts/cmpl-"):
            return {"pages_held": 30, "pages_peak": 60, "pages_full": 120}
        return None


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer({"data": [{"id": "model", "max_model_len": 512}]})
        elif found := self.server.books(self.path):
            self._answer(found)
        else:
            self._answer({"error": "no such thing"}, status=404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = self.server.tokenizer(body["prompt"], add_special_tokens=False)
            return self._answer({"tokens": tokens["input_ids"]})
        self.server.bodies.append(body)
        return self._answer(self.server.completion(body))

    def _answer(self, values: dict[str, Any], status: int | None = None) -> None:
        data = json.dumps(values).encode()
        self.send_response(status or self.server.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


MODEL = EvaluatedModel(
    "model", ModelShape("model", 2, 2, 1, 8), 512, byte_tokenizer(), 0
)


def reach(server: FakeServer, longest: int = 512) -> ServerContender:
    return ServerContender.parse(server.url, MODEL, longest)


def run(server: FakeServer, *requests: Request) -> Any:
    ended: list[Request] = []
    replies = reach(server).open({}).run(requests, ended.append)
    assert ended == list(requests)
    return replies


def test_a_server_may_be_given_a_name(server: FakeServer) -> None:
    assert reach(server).name == "server"
    named = ServerContender.parse(f"full={server.url}/v1/", MODEL, 64)
    assert (named.name, named.server.url) == ("full", server.url)


def test_prompts_go_as_token_ids_and_replies_come_in_their_order(
    server: FakeServer,
) -> None:
    requests = [Request([n, n], reply=6, one_line=True) for n in range(20)]
    replies = run(server, *requests)
    assert [reply.text for reply in replies] == ["yes"] * 20
    assert sorted(body["prompt"] for body in server.bodies) == [
        [n, n] for n in range(20)
    ]
    assert all(body["temperature"] == 0 for body in server.bodies)
    assert all(body["stop"] == ["\n"] for body in server.bodies)


def test_forced_tokens_are_sent_and_what_follows_is_the_text(
    server: FakeServer,
) -> None:
    (reply,) = run(server, Request([1], [40, 41], reply=6, to_the_end=True))
    assert server.bodies[0]["vllm_xargs"] == {FORCED_TOKENS: [40, 41]}
    assert server.bodies[0]["max_tokens"] == 8
    assert "stop" not in server.bodies[0]
    assert reply.token_ids[:2] == [40, 41]
    assert reply.text == "yes\nno"


def test_log_probabilities_are_read_by_token_id(server: FakeServer) -> None:
    (reply,) = run(server, Request([1], [40], reply=1, top=1))
    assert reply.chosen == [-0.5, -0.5]
    assert reply.tops[0] == {40: -0.5}
    assert math.isclose(sum(reply.chosen), -1)


def test_memory_is_what_receipts_of_the_server_say(server: FakeServer) -> None:
    server.has_books = True
    (reply,) = run(server, Request([1], reply=1))
    assert reply.pages == Pages(held=30, peak=60, full=120, page_bytes=8192)


def test_a_server_without_receipts_tells_no_memory(server: FakeServer) -> None:
    (reply,) = run(server, Request([1], reply=1))
    assert reply.pages is None


def test_a_server_that_does_not_force_tokens_is_told_how(server: FakeServer) -> None:
    server.obeys = False
    with pytest.raises(UserError, match="--logits-processors kvserve"):
        run(server, Request([1], [40, 41], reply=1))


def test_an_error_of_the_server_is_one_line(server: FakeServer) -> None:
    backend = reach(server).open({})
    server.status = 500
    with pytest.raises(UserError, match="/v1/completions said 500") as raised:
        backend.run([Request([1], reply=1)], lambda _: None)
    assert "\n" not in str(raised.value)


def test_a_server_that_is_down_is_one_line() -> None:
    with pytest.raises(UserError, match="no server answers") as raised:
        ServerContender.parse("http://127.0.0.1:9", MODEL, 64)
    assert "\n" not in str(raised.value)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        ServerContender.parse("localhost:8000", MODEL, 64)


def test_requests_longer_than_the_server_takes_are_refused(server: FakeServer) -> None:
    with pytest.raises(UserError, match=r"--length: .*up to 512 tokens"):
        reach(server, longest=600)


def test_a_server_of_other_tokens_is_refused(server: FakeServer) -> None:
    server.tokenizer = lambda text, **_: {"input_ids": [len(text)]}
    with pytest.raises(UserError, match="tokens are not those of model"):
        reach(server)
