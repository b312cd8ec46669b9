# SPDX-License-Identifier: Apache-2.0
"""Tokens that a request forces: whatever it says, the engine never sees nonsense."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from kvserve.engine.start.admission import PolicyGuard
from kvserve.engine.worker.forced_tokens import ForcedTokens
from kvserve.extra_args import FORCED_PROCESSOR, FORCED_TOKENS
from kvserve.http.request_policies import guard_requests

VOCABULARY = 100


def ask(forced: object, loaded: bool = True, **sampling: Any) -> list[str]:
    """Send a request through the guard of a server; return what came through."""
    called: list[str] = []
    client = SimpleNamespace(
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            max_model_len=50,
            logits_processors=[FORCED_PROCESSOR] if loaded else None,
            get_vocab_size=lambda: VOCABULARY,
        ),
        generate=lambda *values: called.append(values[-1]),
    )
    guard_requests(client, SimpleNamespace(), PolicyGuard(None, 50, 99))  # type: ignore[arg-type]
    params = SamplingParams(
        **{"max_tokens": 4, **sampling}, extra_args={FORCED_TOKENS: forced}
    )
    client.generate({"type": "token", "prompt_token_ids": [1]}, params, "through")
    return called


@pytest.mark.parametrize("forced", [[], [0], [99, 0, 5, 7]])
def test_tokens_of_the_vocabulary_pass(forced: list[int]) -> None:
    assert ask(forced) == ["through"]


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        ([100], "100 is no token: the vocabulary has 100, from 0 on"),
        ([3, 10_000_000], "10000000 is no token"),
        ([1 << 62], "is no token"),
        ([-1], "expected a list of token ids"),
        ([1.0], "expected a list of token ids"),
        ([True], "expected a list of token ids"),
        (["7"], "expected a list of token ids"),
        ([None], "expected a list of token ids"),
        ([[1]], "expected a list of token ids"),
        ("7", "expected a list of token ids"),
        ("", "expected a list of token ids"),
        (0, "expected a list of token ids"),
        (7.5, "expected a list of token ids"),
        ({"a": 1}, "expected a list of token ids"),
        ([1] * 5, "5 tokens are more than the reply's 4"),
    ],
)
def test_all_else_is_refused_by_the_name_of_the_field(
    forced: object, said: str
) -> None:
    with pytest.raises(VLLMValidationError, match=said) as caught:
        ask(forced)
    assert caught.value.parameter == f"vllm_xargs.{FORCED_TOKENS}"


def test_a_reply_without_end_forces_what_a_request_can_hold() -> None:
    assert ask([1] * 50, max_tokens=None) == ["through"]
    with pytest.raises(VLLMValidationError, match="51 tokens are more"):
        ask([1] * 51, max_tokens=None)


def test_a_server_that_forces_nothing_says_so() -> None:
    with pytest.raises(VLLMValidationError, match="--logits-processors"):
        ask([1], loaded=False)


def test_a_grammar_and_forced_tokens_contradict_each_other() -> None:
    grammar = StructuredOutputsParams(regex="a+")
    with pytest.raises(VLLMValidationError, match="structured outputs"):
        ask([1], structured_outputs=grammar)


@pytest.mark.parametrize("forced", ["7", 0, [-1], [1.5]])
def test_the_processor_itself_refuses_what_no_vocabulary_has(forced: object) -> None:
    with pytest.raises(ValueError, match=FORCED_TOKENS):
        ForcedTokens.validate_params(SamplingParams(extra_args={FORCED_TOKENS: forced}))
