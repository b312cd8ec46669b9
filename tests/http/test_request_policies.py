# SPDX-License-Identifier: Apache-2.0
"""A policy per request, asked for as users do: with the openai client."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from kvserve.http.metrics import POLICY_COUNTERS, POLICY_GAUGES
from kvserve.http.models import PolicyBody, RequestReceipt, Stats
from tests.http.harness import MODEL, Server

pytestmark = pytest.mark.engine

LONG = "The tide came in slowly over the flats and the boats began to lift. " * 45
PARAMETER = "vllm_xargs.kv_policy"
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two API processes whose requests may name policies."""
    server = Server(
        tmp_path_factory.mktemp("mixed"),
        "--allow-request-policies",
        *("--api-server-count", "2", "--enable-scale-out"),
    )
    yield server
    assert server.stop() in (0, -signal.SIGTERM, 143)


def client_of(server: Server) -> OpenAI:
    """A client with a connection of its own, which any API process may take."""
    return OpenAI(
        base_url=f"{server.base}/v1", api_key=server.key or "none", max_retries=0
    )


def naming(policy: object) -> dict[str, Any]:
    return {"vllm_xargs": {"kv_policy": policy}}


def asked(policy: object, stream: bool, extra: dict[str, Any]) -> dict[str, Any]:
    """What all routes are asked alike."""
    body = {**naming(policy), **extra}
    return {"model": MODEL, "temperature": 0, "stream": stream, "extra_body": body}


def chat(client: OpenAI, policy: object, stream: bool, **extra: Any) -> Any:
    messages: Any = [{"role": "user", "content": LONG}]
    ask = client.chat.completions.create
    return ask(messages=messages, max_tokens=8, **asked(policy, stream, extra))


def complete(client: OpenAI, policy: object, stream: bool, **extra: Any) -> Any:
    ask = client.completions.create
    return ask(prompt=LONG, max_tokens=8, **asked(policy, stream, extra))


def respond(client: OpenAI, policy: object, stream: bool, **extra: Any) -> Any:
    ask = client.responses.create
    return ask(input=LONG, max_output_tokens=8, **asked(policy, stream, extra))


ASKS = [chat, complete, respond]


def id_of(reply: Any, stream: bool) -> str:
    """The id of a reply, once it is complete."""
    if not stream:
        return str(reply.id)
    chunks = list(reply)
    first = chunks[0]
    return str(first.response.id if hasattr(first, "response") else first.id)


def receipt_of(server: Server, request_id: str) -> RequestReceipt:
    with server.client() as client:
        found = client.get(f"/v1/kv/receipts/{request_id}")
        assert found.status_code == 200, found.text
        return RequestReceipt(**found.json())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", ASKS)
def test_the_same_server_answers_under_several_policies(
    mixed: Server, ask: Ask, stream: bool
) -> None:
    expected = {
        "full": ("full", 1.0),
        "sink-recent:recent=96": ("sink-recent", 128 / 710),
        "retrieval:full_ratio=0.5,recent=96": ("retrieval", 0.59),
    }
    for text, (policy, share) in expected.items():
        client = client_of(mixed)
        receipt = receipt_of(mixed, id_of(ask(client, text, stream), stream))
        assert receipt.policy == policy
        kept = receipt.entries_retained / receipt.entries_seen
        assert kept == pytest.approx(share, abs=0.05)
        assert {one.policy for one in receipt.sequences} == {policy}
    assert receipt.arguments == "full_ratio=0.5,recent=96"


def test_who_names_nothing_gets_the_servers_policy(mixed: Server) -> None:
    reply = client_of(mixed).completions.create(model=MODEL, prompt=LONG, max_tokens=4)
    receipt = receipt_of(mixed, reply.id)
    assert (receipt.policy, receipt.arguments) == ("retrieval", "")
    assert receipt.entries_evicted > 0


def test_samples_and_prompts_of_a_request_share_its_policy(mixed: Server) -> None:
    reply = client_of(mixed).completions.create(
        model=MODEL,
        prompt=[LONG, "short"],
        n=2,
        temperature=1,
        max_tokens=4,
        extra_body=naming("full"),
    )
    receipt = receipt_of(mixed, reply.id)
    assert [one.policy for one in receipt.sequences] == ["full"] * 4
    assert receipt.entries_evicted == 0


BAD: list[tuple[object, str]] = [
    ("nothing", "is no policy; name one of full"),
    ("snapkv:window=0", "window=0: must be between 1 and 512"),
    ("sink-recent:recent=0", "recent=0: must be at least 1"),
    ("sink-recent:resent=64", "no such argument"),
    ("retrieval:profile=/etc/passwd", "a request sets numbers and switches"),
    ("/etc/passwd.toml", "is no policy"),
    ("sink-recent:budget=0.01", "less than the 64 tokens"),
    ("sharded:block=32", "declares no block-sparse pattern"),
    (3, "expected a text NAME"),
    ("", "expected a text NAME"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", ASKS)
def test_what_cannot_be_honoured_gets_400_that_names_the_parameter(
    mixed: Server, ask: Ask, stream: bool
) -> None:
    for text, message in BAD:
        check_refused(lambda text=text: ask(client_of(mixed), text, stream), message)


def check_refused(send: Callable[[], Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        send()
    assert caught.value.status_code == 400
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["param"] == PARAMETER
    assert body["type"] == "BadRequestError"
    assert body["code"] == 400
    assert PARAMETER in body["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", ASKS)
def test_without_the_flag_a_named_policy_gets_400(
    server: Server, ask: Ask, stream: bool
) -> None:
    for text in ("full", "nothing"):
        check_refused(
            lambda text=text: ask(client_of(server), text, stream),
            "without --allow-request-policies",
        )


def test_beam_search_would_lose_the_policy_and_is_refused(mixed: Server) -> None:
    for ask in (chat, complete):
        check_refused(
            lambda ask=ask: ask(
                client_of(mixed), "full", False, use_beam_search=True, n=2
            ),
            "beam search takes no kv_policy",
        )


def test_other_routes_refuse_too(mixed: Server) -> None:
    message = {"role": "user", "content": "hello"}
    sampling = {"max_tokens": 4, "extra_args": {"kv_policy": "nothing"}}
    bodies = {
        "/v1/messages": {"messages": [message], "max_tokens": 4, **naming("nothing")},
        "/inference/v1/generate": {
            "token_ids": [5, 6, 7],
            "sampling_params": sampling,
        },
    }
    with mixed.client() as client:
        for path, body in bodies.items():
            reply = client.post(path, json={"model": MODEL, **body})
            assert reply.status_code == 400, (path, reply.text)
            assert "is no policy" in reply.text


def test_a_server_of_stock_vllm_would_say_so_too(tmp_path: Any) -> None:
    stock = Server(tmp_path, "--policy", "none")
    try:
        check_refused(lambda: chat(client_of(stock), "full", False), "stock vLLM")
    finally:
        stock.stop()


def labelled(client: httpx.Client) -> dict[tuple[str, str], float]:
    names = {*POLICY_GAUGES, *POLICY_COUNTERS}
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, sample.labels["policy"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name in names
    }


def test_stats_and_metrics_tell_policies_apart(mixed: Server) -> None:
    with mixed.client() as http:
        before = labelled(http)
        found = PolicyBody(**http.get("/v1/kv/policy").json())
        assert (found.policy, found.request_policies) == ("retrieval", True)
        body = {"model": MODEL, "prompt": LONG, "max_tokens": 400, "ignore_eos": True}
        body |= {"stream": True, **naming("sink-recent:recent=96")}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            time.sleep(2.5)
            with mixed.client() as other:
                stats = Stats(**other.get("/v1/kv/stats").json())
                busy = labelled(other)
        assert stats.cache is not None
        assert [one.policy for one in stats.cache.requests] == ["sink-recent"]
        assert busy["kvserve_policy_requests_running", "sink-recent"] == 1
        assert busy["kvserve_policy_pages_held", "sink-recent"] > 0
        time.sleep(2.5)
        after = labelled(http)
    ended = "kvserve_policy_requests_ended_total", "sink-recent"
    assert after[ended] == before.get(ended, 0) + 1
    assert after["kvserve_policy_requests_running", "sink-recent"] == 0
    # Names of installed policies alone, whatever clients send.
    assert {policy for _, policy in after} <= {"full", "sink-recent", "retrieval"}
    seen, kept = (
        after[f"kvserve_policy_entries_{what}_total", "full"]
        for what in ("seen", "retained")
    )
    assert seen == kept > 0
