# SPDX-License-Identifier: Apache-2.0
"""The routes below /v1/kv and the metrics, on a running server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from kvserve.http.metrics import COUNTERS, GAUGES
from kvserve.http.models import (
    Integrity,
    PlanBody,
    PolicyBody,
    Receipts,
    RequestReceipt,
    Stats,
)
from tests.http.harness import MODEL, Server, completion

pytestmark = pytest.mark.engine

LONG = "The tide came in slowly over the flats and the boats began to lift. " * 70
LANES, PAGE = 90, 32


def metrics_of(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("kvserve_")
    }


def events_of(client: httpx.Client, count: int) -> list[Stats]:
    """Read that many server-sent events."""
    found = []
    with client.stream("GET", "/v1/kv/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(Stats.model_validate_json(line.removeprefix("data: ")))
            if len(found) == count:
                return found
    raise AssertionError("the stream ended")


@contextmanager
def running(client: httpx.Client, max_tokens: int = 400) -> Iterator[None]:
    """Keep a long request running meanwhile, and abort it then."""
    body = completion(LONG, max_tokens, stream=True)
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # its end would close the response
        next(lines)
        yield


def test_the_policy_comes_with_its_budgets_and_where_they_come_from(
    client: httpx.Client,
) -> None:
    found = PolicyBody(**client.get("/v1/kv/policy").json())
    assert found.policy == "retrieval"
    assert found.arguments is not None
    assert found.arguments["full_ratio"] == 0.2
    assert found.budgets is not None
    retained = [head for layer in found.budgets.retained for head in layer]
    assert (len(retained), retained.count(2048)) == (LANES, 18)
    assert set(retained) == {2048, 512}
    assert found.budgets.recent is not None
    assert [None, 480, 480] in found.budgets.recent
    assert found.kv_cache_dtype is not None
    width = {"float32": 4, "bfloat16": 2}[found.kv_cache_dtype]
    assert found.page_bytes == PAGE * 2 * 64 * width
    assert found.profiles is not None
    (profile,) = found.profiles
    assert profile.facts["model"] == MODEL
    assert len(profile.sha256) == 64
    short = client.get("/v1/kv/policy", params={"context": 100}).json()
    assert short["budgets"]["retained"] == [[100] * 3] * 30


def test_stats_show_what_a_request_holds_and_that_it_gives_it_back(
    client: httpx.Client,
) -> None:
    with running(client):
        time.sleep(1.1)
        found = Stats(**client.get("/v1/kv/stats").json())
    cache = found.cache
    assert found.running == 1
    assert cache is not None
    (request,) = cache.requests
    assert request.tokens_seen > request.prompt_tokens > 1000
    assert cache.entries_seen == request.tokens_seen * LANES
    assert cache.entries_retained == sum(map(sum, cache.retained_by_head))
    assert cache.entries_retained == request.entries_retained < cache.entries_seen
    full = -(-request.tokens_seen // PAGE) * LANES
    assert cache.bytes.full == full * cache.bytes.held / cache.pages.held
    assert cache.bytes.saved == cache.bytes.full - cache.bytes.held > 0
    assert cache.compression_ratio == pytest.approx(full / cache.pages.held)
    assert cache.entries_evicted > 0
    assert idle(client).pages.held == 0


def test_books_are_sound_while_a_request_runs_and_when_it_is_gone(
    client: httpx.Client,
) -> None:
    check = {"check": 1}
    with running(client):
        time.sleep(1.1)
        busy = Stats(**client.get("/v1/kv/stats", params=check).json())
    assert busy.running == 1
    assert busy.integrity == Integrity(sound=True, faults=[])
    idle(client)
    gone = Stats(**client.get("/v1/kv/stats", params=check).json())
    assert gone.integrity == Integrity(sound=True, faults=[])


def idle(client: httpx.Client) -> Any:
    """Wait until no request runs, and return what the cache says then."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = Stats(**client.get("/v1/kv/stats").json())
        if found.running == found.waiting == 0:
            return found.cache
        time.sleep(0.3)
    raise AssertionError("requests still run")


def test_events_come_once_a_second_and_move(client: httpx.Client) -> None:
    with running(client):
        found = events_of(client, 4)
    gaps = [b.time - a.time for a, b in pairwise(found)]
    assert all(0.4 < gap < 3 for gap in gaps)
    assert found[0].traffic is not None
    assert found[-1].traffic is not None
    assert found[-1].traffic.generation_tokens > found[0].traffic.generation_tokens
    assert found[-1].cache is not None
    assert found[-1].cache.pages.held > 0


def test_a_receipt_is_found_by_every_name_of_its_request(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json=completion(LONG, 20))
    names = reply.headers["X-Request-Id"], reply.json()["id"]
    found = [RequestReceipt(**client.get(f"/v1/kv/receipts/{n}").json()) for n in names]
    assert found[0].sequences == found[1].sequences
    usage = reply.json()["usage"]
    assert found[0].tokens_seen == usage["total_tokens"] - 1
    assert found[0].entries_seen == found[0].tokens_seen * LANES
    assert 0 < found[0].entries_evicted < found[0].entries_seen
    assert f"tokens-seen={found[0].tokens_seen}," in reply.headers["X-KV-Receipt"]
    engine_name = found[0].sequences[0].request_id
    assert client.get(f"/v1/kv/receipts/{engine_name}").status_code == 200
    listed = Receipts(**client.get("/v1/kv/receipts?limit=1").json())
    assert [one.request_id for one in listed.data] == [engine_name]


def test_a_receipt_adds_up_samples_and_prompts(client: httpx.Client) -> None:
    body = completion("", 6, n=2, temperature=1) | {"prompt": ["one two", "three"]}
    reply = client.post(
        "/v1/completions", json=body, headers={"X-Request-Id": "mine-1-2"}
    )
    assert reply.headers["X-Request-Id"] == "mine-1-2"
    found = RequestReceipt(**client.get("/v1/kv/receipts/mine-1-2").json())
    assert len(found.sequences) == 4
    assert found.tokens_seen == sum(one.tokens_seen for one in found.sequences)


def test_a_strange_request_id_is_replaced(client: httpx.Client) -> None:
    headers = {"X-Request-Id": "a b\tc/../d"}
    reply = client.post("/v1/completions", json=completion("a", 2), headers=headers)
    name = reply.headers["X-Request-Id"]
    assert name.isalnum()
    assert client.get(f"/v1/kv/receipts/{name}").status_code == 200


def test_an_unknown_receipt_is_not_found(client: httpx.Client) -> None:
    reply = client.get("/v1/kv/receipts/nobody")
    assert reply.status_code == 404
    assert "nobody" in reply.json()["error"]["message"]


def test_the_plan_is_that_of_the_pool(client: httpx.Client) -> None:
    found = PlanBody(**client.get("/v1/kv/plan?context=2048").json())
    assert found.pages_full == 64 * LANES
    assert found.pages == 18 * 64 + 72 * 16
    # All but the last to come have read their prompts, and given back what they passed.
    assert found.pages_peak == 64 * LANES
    others = found.pool_pages - found.pages_peak
    assert found.requests_fit == others // found.pages + 1
    assert found.requests_fit > found.requests_fit_full > 0


@pytest.mark.parametrize("context", ["0", "-1", "2049", "many", ""])
def test_a_context_that_cannot_be_is_refused(
    client: httpx.Client, context: str
) -> None:
    reply = client.get("/v1/kv/plan", params={"context": context})
    assert reply.status_code == 400
    assert "context" in reply.json()["error"]["message"]


def test_metrics_say_what_stats_say(client: httpx.Client) -> None:
    with running(client):
        time.sleep(2.2)
        busy = metrics_of(client)
    assert {"kvserve_policy_info", *GAUGES, *COUNTERS} <= set(busy)
    assert busy["kvserve_pages_held"] > 0
    assert busy["kvserve_compression_ratio"] > 1
    assert busy["kvserve_evictions_total"] > 0
    idle(client)
    time.sleep(1.2)
    after = metrics_of(client)
    assert after["kvserve_pages_held"] == after["kvserve_kv_bytes_full"] == 0
    assert after["kvserve_pages_free"] == after["kvserve_pages_total"]
    assert after["kvserve_compression_ratio"] == 1
    assert after["kvserve_evictions_total"] >= busy["kvserve_evictions_total"]


def test_many_who_ask_at_once_get_one_answer(client: httpx.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: client.get("/v1/kv/stats").json(), range(64)))
    assert len({one["time"] for one in found}) <= 8


def test_openapi_describes_the_routes_with_examples(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    paths = {path: body for path, body in schema["paths"].items() if "/v1/kv" in path}
    assert len(paths) == 6
    for body in paths.values():
        assert body["get"]["description"]
        assert {"200", "401", "503"} <= set(body["get"]["responses"])
    fields = schema["components"]["schemas"]["Cache"]["properties"]
    assert fields["compression_ratio"]["examples"]


SOUND, UNSOUND = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("path", "modes"),
    [
        ("policy", [SOUND, UNSOUND]),
        ("receipts", [SOUND, UNSOUND]),
        ("plan", [SOUND, UNSOUND]),
        # These take no input that could be unsound.
        ("stats", [SOUND]),
        ("receipts/{request_id}", [SOUND]),
    ],
)
def test_no_input_makes_our_routes_fail(
    server: Server, path: str, modes: list[GenerationMode]
) -> None:
    with server.client() as client:
        raw = client.get("/openapi.json").json()
    url = f"/v1/kv/{path}"
    raw["paths"] = {url: raw["paths"][url]}
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=server.base)
    headers = {"Authorization": f"Bearer {server.key}"}
    (operation,) = [result.ok() for result in schema.get_all_operations()]
    statuses = set()
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def send(case: schemathesis.Case) -> None:
            reply = case.call_and_validate(headers=headers, checks=[not_a_server_error])
            statuses.add(reply.status_code)

        send()
    assert statuses <= {200, 400, 404, 405}


def test_bodies_are_json_that_models_accept(client: httpx.Client) -> None:
    for path in ("policy", "stats", "receipts"):
        assert json.loads(client.get(f"/v1/kv/{path}").text)["object"]
