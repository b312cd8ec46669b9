# SPDX-License-Identifier: Apache-2.0
"""Continuations are forced in decode and scored, as lm-evaluation-harness wants it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvserve.errors import UserError
from kvserve.evaluation.log_likelihood import Scorer
from kvserve.extra_args import FORCED_TOKENS
from tests.unit.evaluation.test_eval_remote import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def _tokens(server: FakeServer, text: str) -> list[int]:
    found: list[int] = server.tokenizer(text)["input_ids"]
    return found


def test_the_end_of_a_context_is_decoded_and_the_continuation_alone_scored(
    server: FakeServer,
) -> None:
    (score,) = Scorer(server.url, held=4).scores([("a long context ", "yes")])
    # " yes" has four tokens of -0.5 each: the blank belongs to the continuation.
    assert score == (-2.0, True)
    (body,) = server.bodies
    assert body["prompt"] == _tokens(server, "a long con")
    assert body["vllm_xargs"][FORCED_TOKENS] == _tokens(server, "text yes")
    assert (body["max_tokens"], body["ignore_eos"]) == (8, True)


def test_each_pair_keeps_its_place(server: FakeServer) -> None:
    pairs = [("context", "x" * count) for count in range(1, 9)]
    scores = Scorer(server.url, at_once=4).scores(pairs)
    assert scores == [(-0.5 * count, True) for count in range(1, 9)]


def test_a_text_without_context_is_scored_from_its_second_token_on(
    server: FakeServer,
) -> None:
    assert Scorer(server.url).scores([("", "four")]) == [(-1.5, True)]
    assert server.bodies[0]["prompt"] == _tokens(server, "f")


def test_what_would_be_full_attention_or_not_forced_is_refused(
    server: FakeServer,
) -> None:
    with pytest.raises(UserError, match="held=0: must be at least 1"):
        Scorer(server.url, held=0)
    with pytest.raises(UserError, match=r"up to 512 tokens, .* has 601; serve with"):
        Scorer(server.url).scores([("x" * 600, "y")])
    server.obeys = False
    with pytest.raises(UserError, match="does not say what it is told to"):
        Scorer(server.url).scores([("a", "b")])
