# SPDX-License-Identifier: Apache-2.0
"""Request ids that client, server log and engine share, and headers of replies."""

from __future__ import annotations

import re
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.http.gateway import Gateway, gateway_of, is_request, is_work
from kvserve.http.notices import HEADER as NOTICE
from kvserve.http.notices import collect
from kvserve.http.receipts import of_request, unique_id
from kvserve.http.sampler import EngineSilentError

_ID, _RECEIPT = "X-Request-Id", "X-KV-Receipt"
_SAFE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Gives every request an id: the client's own if it is a plain one.

    vLLM puts the id that a request carries into the engine's name of it and into the
    ``id`` of the reply. It is made unique for that; the client gets its own back, and
    either finds the receipt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        sent = headers.get(_ID, "")
        is_plain = _SAFE.fullmatch(sent) is not None
        request_id = headers[_ID] = unique_id(sent if is_plain else None)
        gateway, notices = gateway_of(scope), collect()
        wants_receipt = gateway.settings.receipt_header and is_work(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                response = MutableHeaders(scope=message)
                response[_ID] = sent if is_plain else request_id
                if notices:
                    response[NOTICE] = "; ".join(notices)
                if wants_receipt and _is_whole_reply(message):
                    await _add_receipt(response, gateway, request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)


def _is_whole_reply(message: Message) -> bool:
    kind = Headers(raw=message["headers"]).get("Content-Type", "")
    return message["status"] == HTTPStatus.OK and kind.startswith("application/json")


async def _add_receipt(
    headers: MutableHeaders, gateway: Gateway, request_id: str
) -> None:
    """Add the receipt of a reply that the engine has finished."""
    if gateway.sampler is None or gateway.draining:
        return
    try:
        receipts = await gateway.sampler.receipts()
    except EngineSilentError:
        return
    found = of_request(receipts or [], request_id)
    if found is not None:
        headers[_RECEIPT] = (
            f"tokens-seen={found.tokens_seen}, entries-seen={found.entries_seen}, "
            f"entries-retained={found.entries_retained}, "
            f"entries-evicted={found.entries_evicted}, pages-held={found.pages_held}, "
            f"policy={found.policy}"
        )
