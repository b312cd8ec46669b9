# SPDX-License-Identifier: Apache-2.0
"""Measures a running server over its OpenAI API, with vLLM's extensions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from kvserve.errors import UserError
from kvserve.evaluation.backend import AT_ONCE, Pages, Reply, Request, generated_text
from kvserve.evaluation.model import EvaluatedModel
from kvserve.extra_args import FORCED_PROCESSOR, FORCED_TOKENS

_PATIENCE = httpx.Timeout(600, connect=10)
_RECEIPT_TRIES, _RECEIPT_SECONDS = 10, 0.2
_SENTENCE = "The quick brown fox jumps over 13 lazy dogs, doesn't it? Ünïcode: 東京."


@dataclass(frozen=True)
class Server:
    """A server that answered.

    Attributes:
        url: without ``/v1``.
        model: what it calls its model.
        longest: tokens of the longest request that it takes; 0 if it does not say.
    """

    url: str
    model: str
    longest: int

    @classmethod
    def reach(cls, url: str) -> Server:
        """Ask a server what it serves.

        Raises:
            UserError: no server answers there, or something that is not one.
        """
        url = url.rstrip("/").removesuffix("/v1")
        (model, *_) = call(url, "GET", "/v1/models")["data"]
        return cls(url, model["id"], int(model.get("max_model_len") or 0))

    def check(self, model: EvaluatedModel, longest: int) -> None:
        """Make sure that our prompts mean the same there.

        Raises:
            UserError: the server's tokenizer is another, or its longest request less
                than ``longest``.
        """
        if self.longest and longest > self.longest:
            raise UserError(
                f"--length: {self.url} takes requests of up to {self.longest} tokens, "
                f"and this asks for {longest}; give shorter lengths, or serve with "
                f"`--max-model-len {longest}`"
            )
        body = {"model": self.model, "prompt": _SENTENCE, "add_special_tokens": False}
        theirs = call(self.url, "POST", "/tokenize", body)["tokens"]
        if theirs != model.tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"--url {self.url}: serves {self.model}, whose tokens are not those of "
                f"{model.name}; name the served model: `kvserve eval MODEL --url ...`"
            )

    def page_bytes(self) -> int | None:
        """Bytes of a page of its KV pool; ``None`` if the server has no such books."""
        plan = _ask(self.url, "/v1/kv/plan?context=32")
        return None if plan is None else int(plan["bytes"]) // int(plan["pages"])


class ServerBackend:
    """Sends token ids, a few requests at a time.

    A server of kvserve gives a receipt of each request: the pages that it held. Stock
    vLLM gives none, and then memory is not told.
    """

    def __init__(self, server: Server, tokenizer: Any) -> None:
        self._server, self._tokenizer = server, tokenizer
        self._page_bytes = server.page_bytes()

    def run(
        self, requests: Sequence[Request], done: Callable[[Request], None]
    ) -> list[Reply]:
        """Run all requests."""

        def one(request: Request) -> Reply:
            body = body_of(self._server.model, request)
            answer = call(self._server.url, "POST", "/v1/completions", body)
            (choice,) = answer["choices"]
            return self._reply(request, choice, self._pages(answer["id"]))

        replies = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for request, reply in zip(
                    requests, pool.map(one, requests), strict=True
                ):
                    replies.append(reply)
                    done(request)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return replies

    def _pages(self, request_id: str) -> Pages | None:
        """Read the receipt of a request, which is written as its pages are freed."""
        if self._page_bytes is None:
            return None
        for _ in range(_RECEIPT_TRIES):
            found = _ask(self._server.url, f"/v1/kv/receipts/{request_id}")
            if found is not None:
                return Pages(
                    found["pages_held"],
                    found["pages_peak"],
                    found["pages_full"],
                    self._page_bytes,
                )
            time.sleep(_RECEIPT_SECONDS)
        return None

    def _reply(
        self, request: Request, choice: dict[str, Any], pages: Pages | None
    ) -> Reply:
        token_ids: list[int] = choice["token_ids"]
        if token_ids[: len(request.forced)] != request.forced:
            raise UserError(
                f"--url {self._server.url}: does not say what it is told to, as "
                "second-turn, perplexity and agreement need; serve with "
                f"`--logits-processors {FORCED_PROCESSOR}`, or leave these tasks out"
            )
        logprobs = choice.get("logprobs") or {}
        return Reply(
            generated_text(self._tokenizer, request, token_ids),
            token_ids,
            list(logprobs.get("token_logprobs") or []),
            [
                _likeliest(top, request.top or 0)
                for top in logprobs.get("top_logprobs") or []
            ],
            pages,
        )

    def close(self) -> None:
        """Leave the server as it is."""


def body_of(model: str, request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": len(request.forced) + request.reply,
        "temperature": 0,
        "ignore_eos": request.to_the_end,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if request.one_line and not request.forced:
        body["stop"] = ["\n"]
    if request.top is not None:
        body["logprobs"] = request.top
    if request.forced:
        body["vllm_xargs"] = {FORCED_TOKENS: request.forced}
    return body


def _likeliest(top: dict[str, float] | None, count: int) -> dict[int, float]:
    """Read one step; a chosen token that is not among the likeliest comes on top."""
    found = {
        int(token.removeprefix("token_id:")): value
        for token, value in (top or {}).items()
    }
    ranked = sorted(found.items(), key=lambda one: -one[1])[:count]
    return dict(ranked)


def _ask(url: str, path: str) -> dict[str, Any] | None:
    """Read what a server may or may not have: ``None`` is 404."""
    reply = _send(url, "GET", path)
    return None if reply.status_code == 404 else _read(url, path, reply)


def call(
    url: str, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    return _read(url, path, _send(url, method, path, body))


def _send(
    url: str, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.request(
            method, url + path, json=body, headers=headers, timeout=_PATIENCE
        )
    except httpx.HTTPError as error:
        raise UserError(
            f"--url {url}: no server answers ({error}); start one with `kvserve "
            "serve`, or check the address"
        ) from None


def _read(url: str, path: str, reply: httpx.Response) -> dict[str, Any]:
    if reply.is_error:
        said = " ".join(reply.text.split())[:200]
        raise UserError(f"--url {url}: {path} said {reply.status_code}: {said}")
    try:
        answer: dict[str, Any] = reply.json()
    except ValueError:
        raise UserError(f"--url {url}: {path} is not an OpenAI API") from None
    return answer
