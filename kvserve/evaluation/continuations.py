# SPDX-License-Identifier: Apache-2.0
"""Tasks without labels: how probable texts are, and how far from the full cache.

Their tokens are fed through decoding and not read as a prompt: a policy that selects
after the prompt would otherwise be measured before it has evicted anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import TOP, Reply, Request
from kvserve.evaluation.tasks import Place, Sample
from kvserve.texts.haystack import passage
from kvserve.texts.needles import chat, encode, fit

_CONTINUATION = 128
_REPLY = 64
_RETELL = "Retell the text above in detail, from its beginning to its end."


def perplexity(place: Place) -> Sample:
    """Text of a novel: all but its last tokens are the prompt, these are forced."""
    start = random.Random(f"perplexity/{place.seed}/{place.index}").random()
    prose = passage(place.text, start, 8 * place.length)
    token_ids = encode(place.tokenizer, prose)[0][: place.length]
    split = len(token_ids) - _CONTINUATION
    if split < _CONTINUATION:
        raise UserError(f"too short; use at least {2 * _CONTINUATION} tokens")
    request = Request(token_ids[:split], token_ids[split:], top=0, to_the_end=True)
    return Sample(request)


def agreement(place: Place) -> Sample:
    """A passage to retell; the reference's reply becomes the forced tokens."""
    start = random.Random(f"agreement/{place.seed}/{place.index}").random()
    prose = passage(place.text, start, 8 * place.length)

    def render(haystack: str) -> _Tokens:
        rendered = chat(place.tokenizer, f"{haystack}\n\n{_RETELL}")
        return _Tokens(encode(place.tokenizer, rendered)[0])

    prompt = fit(place.tokenizer, prose, place.length - _REPLY, render)
    if prompt is None:
        raise UserError("too short for a passage; use a longer length")
    return Sample(Request(prompt.token_ids, reply=_REPLY, top=TOP, to_the_end=True))


@dataclass(frozen=True)
class _Tokens:
    token_ids: list[int]


def nll(reply: Reply) -> float:
    """Mean negative log likelihood of the tokens of a reply, in nats."""
    return -sum(reply.chosen) / len(reply.chosen)


@dataclass(frozen=True)
class Reference:
    """What the full cache said: its reply, and its likeliest tokens at each step."""

    token_ids: list[int]
    tops: list[dict[int, float]]

    def to_json(self) -> dict[str, Any]:
        steps = [[[t, round(p, 5)] for t, p in top.items()] for top in self.tops]
        return {"token_ids": self.token_ids, "tops": steps}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reference:
        tops = [{int(t): float(p) for t, p in top} for top in values["tops"]]
        return cls(list(values["token_ids"]), tops)

    def force(self, request: Request) -> Request:
        """The same request, made to say what the reference said."""
        return replace(request, forced=self.token_ids, reply=0)


def top1_share(reference: Reference, reply: Reply) -> float:
    """Share of the steps at which both hold the same token for the likeliest."""
    pairs = zip(reference.tops, reply.tops, strict=True)
    same = [_likeliest(ours) == _likeliest(theirs) for ours, theirs in pairs]
    return sum(same) / len(same)


def mean_divergence(reference: Reference, reply: Reply) -> float:
    """Mean of :func:`divergence` over the steps, in nats."""
    pairs = list(zip(reference.tops, reply.tops, strict=True))
    return sum(divergence(ours, theirs) for ours, theirs in pairs) / len(pairs)


def divergence(reference: dict[int, float], other: dict[int, float]) -> float:
    """KL divergence, in nats, of two distributions known by their likeliest tokens.

    Tokens that both list stand for themselves, all others are one class. Merging
    classes never raises a divergence, so this is a lower bound of the whole one.

    Args:
        reference, other: log probabilities of the likeliest tokens.
    """
    shared = reference.keys() & other.keys()
    ours = [math.exp(reference[token]) for token in shared]
    theirs = [math.exp(other[token]) for token in shared]
    classes = zip(_with_rest(ours), _with_rest(theirs), strict=True)
    return max(sum(p * math.log(p / q) for p, q in classes if p > 0), 0.0)


def _with_rest(shares: Sequence[float]) -> list[float]:
    # Rounded log probabilities may add up to a little more than one.
    return [*shares, max(1 - sum(shares), 1e-6)]


def _likeliest(top: dict[int, float]) -> int:
    return max(top, key=lambda token: (top[token], -token))
