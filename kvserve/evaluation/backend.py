# SPDX-License-Identifier: Apache-2.0
"""What an evaluation needs of an engine, wherever that runs.

``kvserve.evaluation.engine`` drives an engine in this process, ``remote.py`` a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TOP = 20
"""Likeliest tokens of a step that are compared: what servers give by default."""

AT_ONCE = 8
"""Requests that run together."""


@dataclass(frozen=True)
class Request:
    """One greedy request.

    Attributes:
        prompt: token ids.
        forced: token ids that follow, fed through decoding one by one as if the model
            had chosen them. A policy treats them as its own reply.
        reply: tokens to generate after these.
        top: log probabilities of so many likeliest tokens of each step; 0 asks for
            those of chosen tokens alone, ``None`` for none.
        one_line: the reply ends with its first line.
        to_the_end: go on after the model's end-of-text token.
        system: first tokens of the prompt that say what its system prompt says.
    """

    prompt: list[int]
    forced: list[int] = field(default_factory=list)
    reply: int = 0
    top: int | None = None
    one_line: bool = False
    to_the_end: bool = False
    system: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the request may reach."""
        return len(self.prompt) + len(self.forced) + self.reply


@dataclass(frozen=True)
class Pages:
    """Pages of the engine's pool that one request held.

    Attributes:
        held: when it ended.
        peak: the most it ever held; a dense prefill holds a full cache.
        full: what a cache that evicts nothing would have held when it ended.
        page_bytes: size of a page.
    """

    held: int
    peak: int
    full: int
    page_bytes: int


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        text: what was generated after the forced tokens.
        token_ids: forced and generated tokens.
        chosen: log probability of each of these tokens, if asked for.
        tops: the likeliest tokens of each step and their log probabilities.
        pages: ``None`` where the engine does not tell.
        first_after: seconds from when the request was let in to its first token,
            likewise.
    """

    text: str
    token_ids: list[int]
    chosen: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    pages: Pages | None = None
    first_after: float | None = None


class Backend(Protocol):
    """An engine under one policy."""

    def run(
        self, requests: Sequence[Request], done: Callable[[Request], None]
    ) -> list[Reply]:
        """Run requests, in whatever batches suit; ``done`` is told of each that ends.

        Raises:
            UserError: the engine cannot be reached, or cannot do what is asked.
        """

    def close(self) -> None:
        """Free the engine, so that another one can start."""


def generated_text(tokenizer: Any, request: Request, token_ids: list[int]) -> str:
    """The text that was generated after the forced tokens.

    Args:
        tokenizer: of ``transformers``.
        token_ids: forced and generated tokens.
    """
    generated = token_ids[len(request.forced) :]
    end = tokenizer.eos_token_id
    if end in generated:
        generated = generated[: generated.index(end)]
    text: str = tokenizer.decode(generated, skip_special_tokens=True)
    return text.lstrip("\n").split("\n", 1)[0] if request.one_line else text
