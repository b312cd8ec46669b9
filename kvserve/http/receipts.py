# SPDX-License-Identifier: Apache-2.0
"""Receipts by the names that clients know.

vLLM's engine names a sequence ``[N_]KIND-ID[-N][-STEP-beam-N]-RANDOM``: ``KIND-ID`` is
the ``id`` of the response, the first number tells samples (``n``) apart and the second
prompts. Turns of a response of the Responses API are ``resp_ID_N-RANDOM``.

``ID`` is what :func:`unique_id` makes of an ``X-Request-Id``: its last part is of this
server's making, so that no choice of ids makes one request of two.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kvserve.http.models import Receipt, RequestReceipt

_KINDS = "chatcmpl|cmpl|resp|generate-tokens|generative-scoring|classify|score"
_NAME = re.compile(
    rf"(\d+_)?(?P<reply>((?:{_KINDS})[-_])?"
    r"(?P<id>((?P<client>.+)-)?[0-9a-f]{32}))"
    r"([-_]\d+)?(-[0-9a-f]{32}-beam-\d+)?(-[0-9a-f]{8})?"
)
_SUMMED = [
    name for name, field in Receipt.model_fields.items() if field.annotation is int
]
"""Whole numbers are counts, of which a request has those of all its sequences."""


def unique_id(client_id: str | None = None) -> str:
    """Name a request like no other, whatever its client calls it."""
    own = uuid.uuid4().hex
    return f"{client_id}-{own}" if client_id else own


def of_request(
    receipts: Sequence[Mapping[str, Any]], request_id: str
) -> RequestReceipt | None:
    """Add up the receipts of all sequences of a request.

    Args:
        receipts: the last to end first.
        request_id: the ``id`` of its response, its ``X-Request-Id``, or the engine's
            name of one of its sequences. Of requests that share an ``X-Request-Id``
            the last to end is meant.
    """
    found = _sequences(receipts, request_id)
    if not found:
        return None
    return RequestReceipt(
        request_id=request_id,
        finished=max(one.finished for one in found),
        sequences=found,
        policy=found[0].policy,
        arguments=found[0].arguments,
        protected=found[0].protected,
        **{name: sum(getattr(one, name) for one in found) for name in _SUMMED},
    )


def _sequences(receipts: Sequence[Mapping[str, Any]], wanted: str) -> list[Receipt]:
    by_client: dict[str, list[Receipt]] = {}
    by_reply: list[Receipt] = []
    for one in receipts:
        name = one["request_id"]
        if name == wanted:
            return [Receipt(**one)]
        known = _NAME.fullmatch(name)
        if known is None:
            continue
        if wanted in (known["reply"], known["id"]):
            by_reply.append(Receipt(**one))
        elif wanted == known["client"]:
            by_client.setdefault(known["id"], []).append(Receipt(**one))
    # Only ids of our own making tell requests apart, so one of these goes first.
    return by_reply or next(iter(by_client.values()), [])
