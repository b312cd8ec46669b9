# SPDX-License-Identifier: Apache-2.0
"""Tokens that a request has protected: ``FIRST-BEHIND[,FIRST-BEHIND...]``.

Eviction drops instructions before anything else (arXiv 2510.00231). The first tokens of
a prompt stay in every head: its sinks become as many. Others a policy that thins keeps
before the rest of their groups, as many as each head keeps at all; so positions alone
decide how much a request holds, as ever.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache

from kvserve.errors import UserError
from kvserve.plan.rule import Rule
from kvserve.plan.streaming import StreamRule
from policies.full import Full
from policies.thinning import ThinningPolicy

MOST_SPANS = 64
_LONGEST_TEXT = 20 * MOST_SPANS
SYSTEM = "system"
"""What a request says instead of numbers; whoever reads its messages knows them."""
_SPAN = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")

Spans = tuple[tuple[int, int], ...]


def parse_spans(text: object) -> Spans:
    """Read spans of tokens, each a first one and the first behind.

    Returns:
        Spans in order, those that touch joined.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    if text == SYSTEM:
        raise UserError(
            f"`{SYSTEM}` is for chats, whose messages tell where it ends; name spans "
            "of tokens here, such as 0-200"
        )
    # Nothing a client sends makes it long to read, or to remember.
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        raise _expected()
    return _parse(text)


def _expected() -> UserError:
    return UserError(
        f"expected `{SYSTEM}`, or at most {MOST_SPANS} spans of tokens FIRST-BEHIND "
        "with commas, such as 0-200,950-1000"
    )


@lru_cache(maxsize=256)
def _parse(text: str) -> Spans:
    found = [_SPAN.fullmatch(part) for part in text.split(",")]
    if len(found) > MOST_SPANS or not all(found):
        raise _expected()
    spans: list[tuple[int, int]] = []
    for first, behind in sorted((int(m[1]), int(m[2])) for m in found if m):
        if first >= behind:
            raise UserError(f"{first}-{behind}: is empty; the second number is behind")
        if spans and first <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(behind, spans[-1][1])
        else:
            spans.append((first, behind))
    return tuple(spans)


def protecting(rule: StreamRule, spans: Spans) -> StreamRule:
    """The same rule, of a request that has tokens protected.

    A policy that keeps everything protects whatever is asked for.

    Raises:
        UserError: one line; its policy can keep no more than first and last tokens.
    """
    leading = spans[0][1] if spans and spans[0][0] == 0 else 0
    rest = spans[1:] if leading else spans
    if isinstance(rule.policy, Full):
        rest = ()
    if rest and not isinstance(rule.policy, ThinningPolicy):
        first, behind = rest[0]
        raise UserError(
            f"{first}-{behind}: policy {rule.policy.name} can protect a span that "
            "begins at 0 alone; policies that thin, such as kvzap, take others"
        )
    leading = min(leading, rule.max_tokens)
    return dataclasses.replace(rule, protected=leading, spans=rest)


def spans_in_words(rule: Rule) -> str:
    """Write the spans that requests of a rule have protected, as they are asked for.

    Of a policy that keeps everything, those that begin at 0 alone: it needs no others.
    """
    if not isinstance(rule, StreamRule):
        return ""
    leading = ((0, rule.protected),) if rule.protected else ()
    return ",".join(f"{first}-{behind}" for first, behind in (*leading, *rule.spans))
