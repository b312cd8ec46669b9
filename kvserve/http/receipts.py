# SPDX-License-Identifier: Apache-2.0
"""Receipts by the names that clients know.

vLLM's engine names a sequence ``[N_]KIND-ID[-N]-RANDOM``: ``ID`` is the request's
``X-Request-Id``, ``KIND-ID`` is the ``id`` of the response, the first number tells
samples (``n``) apart and the second prompts. The Responses API names each turn of a
response ``ID_N-RANDOM``, by the ``id`` of the response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvserve.http.models import Receipt, RequestReceipt

_KINDS = "chatcmpl|cmpl|resp|generate-tokens|classify|score"
_SUMMED = (
    "tokens_seen",
    "entries_seen",
    "entries_retained",
    "entries_evicted",
    "pages_held",
    "pages_peak",
    "pages_full",
)


def of_request(
    receipts: Sequence[Mapping[str, Any]], request_id: str
) -> RequestReceipt | None:
    """Add up the receipts of all sequences of a request.

    Args:
        request_id: its ``X-Request-Id``, the ``id`` of its response, or the engine's
            name of one of its sequences.
    """
    part = "_" if request_id.startswith("resp_") else "-"
    known = re.compile(
        rf"(\d+_)?(({_KINDS})-)?{re.escape(request_id)}({part}\d+)?(-[0-9a-f]{{8}})?"
    )
    found = [Receipt(**one) for one in receipts if known.fullmatch(one["request_id"])]
    if not found:
        return None
    return RequestReceipt(
        request_id=request_id,
        finished=max(one.finished for one in found),
        sequences=found,
        policy=found[0].policy,
        arguments=found[0].arguments,
        **{name: sum(getattr(one, name) for one in found) for name in _SUMMED},
    )
