# SPDX-License-Identifier: Apache-2.0
"""A server with a range of budgets says what requests get, and what they got."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.http.metrics import BUDGET_COUNTERS
from kvserve.http.models import (
    BudgetUse,
    Level,
    PlanBody,
    PolicyBody,
    RequestReceipt,
    Stats,
)
from tests.http.harness import Server, completion

pytestmark = pytest.mark.engine

LONG = "The tide came in slowly over the flats and the boats began to lift. " * 70
NAMES = ["60%", "42.43%", "30%", "21.21%", "15%"]
BURST = 5


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose pool holds one long request at the largest budget."""
    server = Server(
        tmp_path_factory.mktemp("ranged"),
        *("--policy", "sink-recent:budget=60%..15%"),
        *("--kv-cache-memory-bytes", "64M"),
    )
    yield server
    assert server.stop() in (0, -signal.SIGTERM, 143)


@pytest.fixture(scope="module")
def http(ranged: Server) -> Iterator[httpx.Client]:
    with ranged.client() as http:
        yield http


def levels(http: httpx.Client) -> list[Level]:
    """The budgets of the range, the largest first."""
    found = PolicyBody(**http.get("/v1/kv/policy").json())
    assert found.levels is not None
    assert found.arguments == found.levels[-1].arguments
    return found.levels


def used(http: httpx.Client) -> list[BudgetUse]:
    """What stats say of every budget."""
    stats = Stats(**http.get("/v1/kv/stats").json())
    assert stats.cache is not None
    assert stats.cache.budgets is not None
    return stats.cache.budgets


def begun(http: httpx.Client) -> dict[str, float]:
    """Requests that began with each budget, as metrics have it."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        sample.labels["budget"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name in BUDGET_COUNTERS
    }


def test_the_policy_and_its_plan_tell_of_every_budget(http: httpx.Client) -> None:
    assert [level.budget for level in levels(http)] == NAMES
    for one, less in pairwise(levels(http)):
        assert one.kept > less.kept
    plan = PlanBody(**http.get("/v1/kv/plan?context=1500").json())
    assert plan.levels is not None
    assert [level.budget for level in plan.levels] == NAMES
    for more, less_kept in pairwise(plan.levels):
        assert more.bytes > less_kept.bytes
        assert more.requests_fit <= less_kept.requests_fit
    least = plan.levels[-1].model_dump(exclude={"budget"})
    assert least == {name: getattr(plan, name) for name in least}


def ask(server: Server, name: str) -> str:
    """Ask for a reply; return the arguments of the policy that it got."""
    with server.client() as http:
        body = completion(LONG, 48)
        headers = {"X-Request-Id": name}
        assert http.post("/v1/completions", json=body, headers=headers).is_success
        receipt = RequestReceipt(**http.get(f"/v1/kv/receipts/{name}").json())
    return receipt.sequences[0].arguments


def test_a_burst_gets_less_than_one_alone_and_all_is_counted(
    ranged: Server, http: httpx.Client
) -> None:
    recent = {f"recent={one.arguments['recent']}": one.budget for one in levels(http)}
    deadline = time.monotonic() + 30
    while not (before := begun(http)) and time.monotonic() < deadline:
        time.sleep(0.2)  # the server is up before its engine has reported
    assert sum(before.values()) == 0
    assert set(before) == set(NAMES)
    got = [recent[ask(ranged, "alone")]]
    assert got == NAMES[:1]
    with ThreadPoolExecutor(BURST) as pool:
        asked = [f"burst-{number}" for number in range(BURST)]
        got += [recent[one] for one in pool.map(lambda n: ask(ranged, n), asked)]
    assert set(got) > {NAMES[0]}
    deadline = time.monotonic() + 30
    while any(one.running for one in used(http)) and time.monotonic() < deadline:
        time.sleep(0.2)  # a report may be a second old
    assert used(http) == [
        BudgetUse(budget=name, running=0, begun=got.count(name)) for name in NAMES
    ]
    assert begun(http) == {name: got.count(name) for name in NAMES}
