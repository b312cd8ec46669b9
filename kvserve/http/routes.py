# SPDX-License-Identifier: Apache-2.0
"""The routes below ``/v1/kv``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from kvserve.http.engine import ServedPolicy
from kvserve.http.gateway import Gateway, gateway_of
from kvserve.http.keys import NEEDS_KEY, carries_key
from kvserve.http.models import (
    ErrorBody,
    PlanBody,
    PolicyBody,
    Receipt,
    Receipts,
    RequestReceipt,
    Stats,
)
from kvserve.http.receipts import of_request
from kvserve.http.sampler import PERIOD_SECONDS, EngineSilentError, Sampler
from kvserve.http.stats import stats_of
from kvserve.plan.ledger import MOST_RECEIPTS

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A parameter is out of range."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    404: {"model": ErrorBody, "description": "There is no such thing."},
    503: {"model": ErrorBody, "description": "The engine gives no answer."},
}
router = APIRouter(prefix="/v1/kv", tags=["KV cache"], responses=_ERRORS)


def _gateway(request: Request) -> Gateway:
    return gateway_of(request.scope)


def _sampler(gateway: Annotated[Gateway, Depends(_gateway)]) -> Sampler:
    if gateway.sampler is None:
        raise _silent()
    return gateway.sampler


def _policy(gateway: Annotated[Gateway, Depends(_gateway)]) -> ServedPolicy:
    if gateway.policy is None:
        raise _stock()
    return gateway.policy


def _silent() -> HTTPException:
    return HTTPException(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The engine gives no answer.",
        {"Retry-After": "5"},
    )


def _stock() -> HTTPException:
    return HTTPException(
        HTTPStatus.NOT_FOUND,
        "This server runs stock vLLM (--policy none), which has no plan and no "
        "receipts; `--policy full` evicts nothing and has both.",
    )


AGateway = Annotated[Gateway, Depends(_gateway)]
ASampler = Annotated[Sampler, Depends(_sampler)]
APolicy = Annotated[ServedPolicy, Depends(_policy)]
Context = Annotated[
    int, Query(ge=1, description="Tokens of a request, prompt and reply.")
]
Check = Annotated[
    bool,
    Query(description="Check the cache's books, if the server has an API key."),
]


@router.get("/policy")
async def policy(gateway: AGateway, context: Context | None = None) -> PolicyBody:
    """The active policy: parameters, budgets per layer and head, provenance.

    Budgets are those of a request of `context` tokens, by default the longest.
    """
    if gateway.policy is None:
        return PolicyBody(policy="none")
    most = gateway.policy.max_tokens
    return gateway.policy.describe(_checked(context or most, most))


def _may_check(gateway: AGateway, request: Request, check: Check = False) -> bool:
    """Let those check who hold a key: each check keeps every request waiting."""
    if check and not gateway.api_keys:
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "A check holds up every request, so it is for holders of a key: start the "
            "server with --api-key KEY.",
        )
    if check and not carries_key(request.headers, gateway.api_keys):
        bearer = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(HTTPStatus.UNAUTHORIZED, NEEDS_KEY, bearer)
    return check


@router.get(
    "/stats",
    responses={403: {"model": ErrorBody, "description": "No key guards the check."}},
)
async def stats(
    gateway: AGateway,
    check: Annotated[bool, Depends(_may_check)],
    sampler: ASampler,
) -> Stats:
    """What running requests hold, against a full cache, and vLLM's own counters.

    With `check=1` the engine also checks that its pool, page lists, books and prefix
    index agree, between two steps.
    """
    try:
        faults = await sampler.faults() if check else None
        return stats_of(gateway, await sampler.sample(), faults)
    except EngineSilentError:
        raise _silent() from None


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The body of /v1/kv/stats, once a second.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def events(gateway: AGateway, sampler: ASampler) -> StreamingResponse:
    """The body of `/v1/kv/stats`, once a second, as server-sent events."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    body = _events(gateway, sampler)
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


async def _events(gateway: Gateway, sampler: Sampler) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop()
    due = clock.time()
    while not gateway.draining:
        try:
            sample = await sampler.sample(patience=PERIOD_SECONDS)
        except EngineSilentError:
            break
        yield f"data: {stats_of(gateway, sample).model_dump_json()}\n\n"
        due = max(due + PERIOD_SECONDS, clock.time())
        await asyncio.sleep(due - clock.time())


@router.get("/receipts")
async def receipts(
    sampler: ASampler,
    limit: Annotated[int, Query(ge=1, le=MOST_RECEIPTS)] = 100,
) -> Receipts:
    """Receipts of the sequences that ended last."""
    found = await _receipts(sampler)
    data = [Receipt(**one) for one in found[:limit]]
    return Receipts(data=data, has_more=len(found) > limit)


@router.get("/receipts/{request_id}")
async def receipt(
    sampler: ASampler,
    request_id: Annotated[
        str,
        Path(description="`X-Request-Id` or `id` of the response."),
    ],
) -> RequestReceipt:
    """What a finished request saw, kept and evicted, over all its sequences."""
    found = of_request(await _receipts(sampler), request_id)
    if found is None:
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            f"No receipt of {request_id}: it has not ended, held no pages, or ended "
            f"more than {MOST_RECEIPTS} requests ago.",
        )
    return found


async def _receipts(sampler: Sampler) -> list[Any]:
    try:
        found = await sampler.receipts()
    except EngineSilentError:
        raise _silent() from None
    if found is None:
        raise _stock()
    return found


@router.get("/plan")
async def plan(policy: APolicy, sampler: ASampler, context: Context) -> PlanBody:
    """What a request of `context` tokens costs, and how many such requests fit."""
    context = _checked(context, policy.max_tokens)
    try:
        cache = (await sampler.sample()).report.cache
    except EngineSilentError:
        raise _silent() from None
    assert cache is not None, "a served policy reports its cache"
    return policy.plan(context, cache.pages_total)


def _checked(context: int, most: int) -> int:
    if context > most:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"context={context}: a request has at most --max-model-len={most} tokens.",
        )
    return context
