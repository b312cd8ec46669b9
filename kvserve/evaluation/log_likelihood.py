# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations under a served policy, every token of them decoded.

A server that is asked for ``echo`` or ``prompt_logprobs`` reads a continuation together
with its context, which policies that compress after the prompt do with full attention.
Here the context alone is the prompt, and the continuation is forced in decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import Request
from kvserve.evaluation.remote import Server, body_of, call
from kvserve.extra_args import FORCED_PROCESSOR

Score = tuple[float, bool]
"""Natural logarithm of the probability, and whether greedy decoding would say so."""


class Scorer:
    """Scores continuations on one server.

    Args:
        url: of the server, with or without ``/v1``.
        held: tokens at the end of a context that are decoded too, without being
            scored. A policy has compressed only what lies before them, so with at
            least one the whole continuation is predicted from what it kept.
        at_once: requests that run together.
    """

    def __init__(self, url: str, held: int = 1, at_once: int = 8) -> None:
        if held < 1:
            raise UserError(
                f"held={held}: must be at least 1; the first token after a prompt is "
                "predicted before anything has been compressed"
            )
        self.server = Server.reach(url)
        self._held, self._at_once = held, at_once

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Tokens of ``text``, as the server has them.

        Args:
            special: with what the tokenizer puts before a text.
        """
        body = {
            "model": self.server.model,
            "prompt": text,
            "add_special_tokens": special,
        }
        found: list[int] = call(self.server.url, "POST", "/tokenize", body)["tokens"]
        return found

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Score the second text of each pair after the first."""
        with ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(lambda pair: self._score(*pair), pairs))

    def _score(self, context: str, continuation: str) -> Score:
        prompt, scored = self._split(context, continuation)
        if not scored:
            return 0.0, True
        cut = max(len(prompt) - self._held, 1)
        forced = [*prompt[cut:], *scored]
        self._check_fits(cut + len(forced))
        request = Request(prompt[:cut], forced, top=1, to_the_end=True)
        body = body_of(self.server.model, request)
        (choice,) = call(self.server.url, "POST", "/v1/completions", body)["choices"]
        self._check_forced(choice["token_ids"], forced)
        return _read(choice["logprobs"], len(scored))

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context's own tokens end.

        White space at the end of a context belongs to the continuation's first token.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        prompt = self.tokenize(bare, special=True)
        whole = self.tokenize(bare + continuation, special=True)
        if not prompt:
            # The first token has nothing to be predicted from.
            prompt = whole[:1]
        return prompt, whole[len(prompt) :]

    def _check_fits(self, tokens: int) -> None:
        most = self.server.longest
        if most and tokens > most:
            raise UserError(
                f"{self.server.url}: takes requests of up to {most} tokens, and a "
                f"context with its continuation has {tokens}; serve with a larger "
                "--max-model-len, or use a task with shorter texts"
            )

    def _check_forced(self, said: list[int], forced: list[int]) -> None:
        if said != forced:
            raise UserError(
                f"{self.server.url}: does not say what it is told to; serve with "
                f"`--logits-processors {FORCED_PROCESSOR}`"
            )


def _read(logprobs: dict[str, Any], count: int) -> Score:
    """Add up the last ``count`` tokens of a reply."""
    chosen = logprobs["token_logprobs"][-count:]
    likeliest = [max(top.values()) for top in logprobs["top_logprobs"][-count:]]
    return math.fsum(chosen), all(
        one >= best for one, best in zip(chosen, likeliest, strict=True)
    )
