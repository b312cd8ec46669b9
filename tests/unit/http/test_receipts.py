# SPDX-License-Identifier: Apache-2.0
"""Receipts are those of one request, whatever ids clients choose."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.http.receipts import of_request, unique_id

_NUMBERS = dict.fromkeys(
    (
        "tokens_seen",
        "entries_seen",
        "entries_retained",
        "entries_evicted",
        "pages_held",
        "pages_peak",
        "pages_full",
    ),
    1,
)
IDS = st.from_regex(r"[A-Za-z0-9._:-]{1,40}", fullmatch=True)


def receipts(names: list[str]) -> list[dict[str, Any]]:
    """Receipts of engine names, the first of which ended last."""
    return [
        {"request_id": name, "finished": float(-at), **_NUMBERS}
        for at, name in enumerate(names)
    ]


def found(names: list[str], wanted: str) -> list[str]:
    receipt = of_request(receipts(names), wanted)
    if receipt is None:
        return []
    for name in _NUMBERS:
        assert getattr(receipt, name) == len(receipt.sequences)
    return [one.request_id for one in receipt.sequences]


def sequences(request: str, kind: str) -> list[str]:
    """Names that the engine gives to the sequences of a request, by its unique id."""
    step = "f" * 32
    return {
        "chat": [f"chatcmpl-{request}-0123abcd"],
        "samples": [f"{n}_chatcmpl-{request}-0123abcd" for n in range(2)],
        "prompts": [f"cmpl-{request}-{n}-89abcdef" for n in range(2)],
        "chats": [f"chatcmpl-{request}_{n}-89abcdef" for n in range(2)],
        "turns": [f"resp_{request}_{n}-0123abcd" for n in range(2)],
        "scores": [f"generative-scoring-{request}-{n}-0123abcd" for n in range(2)],
        "beams": [f"cmpl-{request}-0-{step}-beam-{n}-0123abcd" for n in range(2)],
    }[kind]


KINDS = ["chat", "samples", "prompts", "chats", "turns", "scores", "beams"]


@given(IDS, IDS, st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_two_requests_never_become_one(
    one: str, two: str, kind: str, other: str
) -> None:
    first, second = unique_id(one), unique_id(two)
    mine, others = sequences(first, kind), sequences(second, other)
    names = [*others, *mine]
    assert found(names, first) == mine
    assert found(names, second) == others
    assert found(names, two) == others
    # Requests of one name are told apart by what their replies are called.
    assert found(names, one) == (others if one == two else mine)


@pytest.mark.parametrize("suffix", ["-1", "-2", "_1", "x", "-0123abcd", ":a"])
def test_a_name_is_not_its_beginning(suffix: str) -> None:
    mine = sequences(unique_id("job"), "prompts")
    others = sequences(unique_id(f"job{suffix}"), "prompts")
    assert found([*others, *mine], "job") == mine


def test_an_id_that_mimics_another_requests_does_not_hide_it() -> None:
    victim = unique_id("job")
    mine = sequences(victim, "chat")
    for mimic in (victim, f"{victim}-0", f"chatcmpl-{victim}", mine[0]):
        others = sequences(unique_id(mimic), "chat")
        assert found([*others, *mine], victim) == mine
        assert found([*others, *mine], f"chatcmpl-{victim}") == mine
        assert found([*others, *mine], mine[0]) == mine


def test_a_request_without_a_name_has_one_of_the_servers() -> None:
    own = unique_id()
    mine = sequences(own, "samples")
    assert own.isalnum()
    assert found([*sequences(unique_id(), "chat"), *mine], own) == mine
    assert found(mine, f"chatcmpl-{own}") == mine
    assert found(mine, ".*") == []
