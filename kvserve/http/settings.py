# SPDX-License-Identifier: Apache-2.0
"""The flags of the HTTP server that are ours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from limits import RateLimitItem, parse

from kvserve.errors import UserError
from kvserve.units import parse_bytes

_BODY_SIZE = "32MiB"

# `--middleware` puts each around those before it: the last sees a request first.
MIDDLEWARE = (
    "kvserve.http.limits.BodyLimit",
    "kvserve.http.limits.RateLimit",
    "kvserve.http.keys.ApiKeys",
    "kvserve.http.draining.Draining",
    "kvserve.http.request_ids.RequestIds",
)


@dataclass(frozen=True)
class HttpSettings:
    """What the flags say.

    Attributes:
        max_body_bytes: longest body that a request may have.
        rate_limit: requests for work that a key may make, or ``None`` for any number.
        receipt_header: whether whole replies carry their receipt.
    """

    max_body_bytes: int
    rate_limit: RateLimitItem | None
    receipt_header: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> HttpSettings:
        """Read the flags; a stock ``vllm serve`` has none and gets the defaults.

        Raises:
            UserError: a flag that cannot be understood.
        """
        size = getattr(args, "max_body_size", _BODY_SIZE)
        return cls(
            max_body_bytes=parse_bytes(size, "--max-body-size"),
            rate_limit=_rate(getattr(args, "rate_limit", None)),
            receipt_header=getattr(args, "receipt_header", False),
        )


def add_http_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-body-size``, ``--rate-limit`` and ``--receipt-header``."""
    group = parser.add_argument_group("kvserve HTTP", "Limits and receipts")
    group.add_argument(
        "--max-body-size",
        default=_BODY_SIZE,
        metavar="BYTES",
        help=f"longest request body, e.g. 4MiB; longer ones get 413 (default "
        f"{_BODY_SIZE})",
    )
    group.add_argument(
        "--rate-limit",
        default=None,
        metavar="N/PERIOD",
        help="requests for work (POST) that an API key, or without keys an address, "
        "may make, e.g. 20/second or 600/minute; more get 429. Each API process "
        "counts for itself (default: no limit)",
    )
    group.add_argument(
        "--receipt-header",
        action="store_true",
        help="let replies that are not streamed carry X-KV-Receipt; they wait for the "
        "step that is running (default: receipts are at /v1/kv/receipts only)",
    )


def _rate(text: str | None) -> RateLimitItem | None:
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        raise UserError(
            f"--rate-limit {text}: expected a number and a period, such as 20/second "
            "or 600/minute"
        ) from None
