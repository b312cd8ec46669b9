# SPDX-License-Identifier: Apache-2.0
"""Protected tokens, asked for as users do; receipts say what was protected."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvserve.http.models import PolicyBody, RequestReceipt
from tests.http.harness import KEY, MODEL, Server

pytestmark = pytest.mark.engine

SYSTEM = {"role": "system", "content": "Answer in capital letters. " * 12}
USER = {"role": "user", "content": "The tide came in slowly over the flats. " * 40}
PARAMETER = "vllm_xargs.kv_protect"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
"""What the model's template adds where nobody says anything."""


@pytest.fixture(scope="module")
def protecting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that protects the system prompts of all chats."""
    server = Server(
        tmp_path_factory.mktemp("protecting"),
        *("--policy", "sink-recent:sinks=32,recent=96", "--protect", "system"),
        "--allow-request-policies",
        key=KEY,
    )
    yield server
    with server.client() as client:
        found = client.get("/v1/kv/stats", params={"check": 1}).json()
    assert found["integrity"] == {"sound": True, "faults": []}
    assert server.stop() in (0, -signal.SIGTERM, 143)


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json={"model": MODEL, "temperature": 0, **body})


def chat(server: Server, *messages: Any, **body: Any) -> httpx.Response:
    sent = {"messages": [*messages], "max_tokens": 4, **body}
    return post(server, "/v1/chat/completions", **sent)


def spans(text: object) -> dict[str, Any]:
    return {"vllm_xargs": {"kv_protect": text}}


def receipt_of(server: Server, reply: httpx.Response) -> RequestReceipt:
    assert reply.status_code == 200, reply.text
    with server.client() as client:
        found = client.get(f"/v1/kv/receipts/{reply.json()['id']}")
    return RequestReceipt(**found.json())


def start_of(server: Server, *messages: Any) -> int:
    """Tokens of a chat ahead of what its user wrote, as the tokenizer has them."""
    body = {"messages": [*messages, {"role": "user", "content": ""}]}
    found = post(server, "/tokenize", add_generation_prompt=False, **body).json()
    # The template closes an empty turn with two more: its end and a new line.
    return int(found["count"]) - 2


@pytest.mark.parametrize("said", [{}, spans("system")])
def test_the_system_prompt_of_a_chat_stays(
    protecting: Server, said: dict[str, Any]
) -> None:
    receipt = receipt_of(protecting, chat(protecting, SYSTEM, USER, **said))
    count = start_of(protecting, SYSTEM)
    assert count > 64
    assert receipt.protected == f"0-{count}"
    plain = receipt_of(protecting, chat(protecting, SYSTEM, USER, **spans("0-1")))
    assert plain.protected == "0-1"
    more = (receipt.entries_retained - plain.entries_retained) / 90
    assert count - 32 <= more < count


def test_what_the_template_adds_is_protected_too(protecting: Server) -> None:
    found = post(protecting, "/tokenize", messages=[USER], return_token_strs=True)
    assert (
        "".join(found.json()["token_strs"])
        .replace("Ġ", " ")
        .replace("Ċ", "\n")
        .startswith(DEFAULT)
    )
    receipt = receipt_of(protecting, chat(protecting, USER))
    assert receipt.protected == f"0-{start_of(protecting)}"


def test_samples_streams_and_other_routes_are_protected(protecting: Server) -> None:
    count = start_of(protecting, SYSTEM)
    two = chat(protecting, SYSTEM, USER, n=2, temperature=1)
    receipt = receipt_of(protecting, two)
    assert [one.protected for one in receipt.sequences] == [f"0-{count}"] * 2
    text = SYSTEM["content"]
    asked = {"instructions": text, "input": USER["content"], "max_output_tokens": 4}
    reply = post(protecting, "/v1/responses", **asked)
    assert receipt_of(protecting, reply).protected == f"0-{count}"
    asked = {"system": text, "messages": [USER], "max_tokens": 4}
    reply = post(protecting, "/v1/messages", **asked)
    assert receipt_of(protecting, reply).protected == f"0-{count}"
    reply = chat(protecting, SYSTEM, USER, stream=True)
    assert reply.status_code == 200
    assert '"error"' not in reply.text


def test_completions_and_policies_of_requests_name_spans(protecting: Server) -> None:
    ask = {"prompt": USER["content"], "max_tokens": 4}
    for extra, policy, protected in (
        ({}, "sink-recent", ""),
        ({"kv_protect": "0-50,20-100"}, "sink-recent", "0-100"),
        ({"kv_protect": "0-999999999"}, "sink-recent", "0-2048"),
        ({"kv_protect": "0-70,90-100", "kv_policy": "full"}, "full", "0-70"),
        (
            {"kv_protect": "0-70", "kv_policy": "retrieval:recent=96"},
            "retrieval",
            "0-70",
        ),
    ):
        reply = post(protecting, "/v1/completions", **ask, vllm_xargs=extra)
        receipt = receipt_of(protecting, reply)
        assert (receipt.policy, receipt.protected) == (policy, protected)


BAD: list[tuple[object, str]] = [
    *((said, "expected `system`, or at most 64 spans") for said in (5, 1.5, "", "a")),
    *((said, "expected `system`") for said in ([0, 5], ["0-5"], "0-5," * 100_000)),
    ("5-5", "is empty"),
    ("5-9", "can protect a span that begins at 0 alone"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_gets_400(protecting: Server, stream: bool) -> None:
    for said, message in BAD:
        for reply in (
            chat(protecting, SYSTEM, USER, stream=stream, **spans(said)),
            post(
                protecting,
                "/v1/completions",
                prompt="hello",
                stream=stream,
                **spans(said),
            ),
            post(
                protecting, "/v1/responses", input="hello", stream=stream, **spans(said)
            ),
        ):
            check_refused(reply, message)


def check_refused(reply: httpx.Response, message: str, param: str = PARAMETER) -> None:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_who_has_no_messages_cannot_have_their_system_prompt(
    protecting: Server,
) -> None:
    reply = post(protecting, "/v1/completions", prompt="hello", **spans("system"))
    check_refused(reply, "`system` is for chats")


def test_beams_and_dense_policies_would_lose_it(protecting: Server) -> None:
    beams = {"use_beam_search": True, "n": 2}
    reply = chat(protecting, USER, **beams)
    check_refused(reply, "would not protect the system prompt", "use_beam_search")
    for ask in (
        chat(protecting, USER, **beams, **spans("0-5")),
        post(protecting, "/v1/completions", prompt="hello", **beams, **spans("0-5")),
    ):
        check_refused(ask, "beam search takes no kv_protect")
    named = {"vllm_xargs": {"kv_policy": "h2o"}}
    reply = chat(protecting, USER, **named)
    check_refused(reply, "policy h2o selects tokens", "vllm_xargs.kv_policy")
    reply = post(protecting, "/v1/completions", prompt="hello", max_tokens=4, **named)
    assert receipt_of(protecting, reply).policy == "h2o"


def test_without_the_flag_nobody_has_anything_protected(server: Server) -> None:
    for said in ("system", "0-5", 7):
        for reply in (
            chat(server, SYSTEM, USER, **spans(said)),
            post(server, "/v1/completions", prompt="hello", **spans(said)),
            post(server, "/v1/responses", input="hello", **spans(said)),
        ):
            check_refused(reply, "without --protect")


def test_the_policy_says_whose_tokens_are_protected(
    protecting: Server, server: Server
) -> None:
    for one, protect in ((protecting, "system"), (server, None)):
        with one.client() as client:
            found = PolicyBody(**client.get("/v1/kv/policy").json())
        assert found.protect == protect
