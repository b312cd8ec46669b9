# SPDX-License-Identifier: Apache-2.0
"""What a request has protected stays, in every head or before everything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvserve.errors import UserError
from kvserve.plan.protection import parse_spans
from policies.base import HeadBudget
from tests.engine.conftest import Model
from tests.engine.harness import PAGE, Engine, EngineSlot, random_prompts
from tests.engine.test_isolation import assert_same
from tests.engine.test_oracle import TOLERANCE, relative_error
from tests.reference.masked_model import MaskedLlama
from tests.reference.thinning import JUDGES

pytestmark = pytest.mark.engine

STEPS = 48
LENGTHS = [129, 601, 410, 800]
POLICIES: dict[str, dict[str, Any]] = {
    "keydiff": {"budget": 0.4, "recent": 64, "group": 64, "length": 700},
    "sink-recent": {"sinks": 32, "recent": 64},
    "retrieval": {"sinks": 32, "recent": 96, "full_ratio": 0.34},
}
SPANS: dict[str, list[str | None]] = {
    "keydiff": [None, "0-100", "300-310,37-41,150-260", "0-96,350-380"],
    "sink-recent": [None, "0-1", "0-100", "0-333"],
    "retrieval": [None, "0-32", "0-100", "0-999"],
}


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny-gqa"]


def start(engines: EngineSlot, model: Model, policy: str, **options: Any) -> Engine:
    arguments = model.policy_args(policy, **POLICIES[policy])
    return engines.start(model.path, policy, arguments, protect=True, **options)


def marked(text: str | None) -> dict[str, Any]:
    return {"extra_args": {"kv_protect": text}} if text else {}


def with_sinks(
    budgets: tuple[tuple[HeadBudget, ...], ...], tokens: int
) -> tuple[tuple[HeadBudget, ...], ...]:
    """The first tokens stay in every head."""
    return tuple(
        tuple(
            dataclasses.replace(head, sinks=max(head.sinks, tokens)) for head in layer
        )
        for layer in budgets
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_those_of_a_model_that_spares_what_is_marked(
    engines: EngineSlot, model: Model, policy: str
) -> None:
    oracle = MaskedLlama(model.path)
    options = {"max_num_batched_tokens": 200, "logprobs_mode": "raw_logits"}
    engine = start(engines, model, policy, **options)
    prompts = random_prompts(LENGTHS, model.vocab, seed=8)
    pairs = [*zip(prompts, SPANS[policy], strict=True)]
    names = [
        engine.add(prompt, STEPS, logprobs=-1, **marked(text)) for prompt, text in pairs
    ]
    engine.finish()
    for name, (prompt, text) in zip(names, pairs, strict=True):
        reply = engine.replies.pop(name)
        spans = parse_spans(text) if text else ()
        spared = {token for span in spans for token in range(*span)}
        leading = spans[0][1] if spans and spans[0][0] == 0 else 0
        budgets = with_sinks(
            model.budgets(policy, model.policy_args(policy, **POLICIES[policy])),
            leading,
        )
        tokens, first = prompt + reply.tokens[:-1], len(prompt) - 1
        expected = oracle.logits(
            tokens, budgets, PAGE, first, JUDGES.get(policy), spared
        )
        assert relative_error(torch.stack(reply.logits), expected).max() < TOLERANCE
        assert expected.argmax(dim=1).tolist() == reply.tokens


def test_pages_of_a_prefix_are_shared_among_equal_marks(
    engines: EngineSlot, model: Model
) -> None:
    (prompt,) = random_prompts([640], model.vocab, seed=9)
    options = {"max_num_batched_tokens": 200}
    alone = start(engines, model, "keydiff", **options)
    texts = SPANS["keydiff"]
    expected = [alone.generate([prompt], STEPS, **marked(one))[0] for one in texts]
    assert len({str(reply.tokens) for reply in expected}) == len(texts)
    sharing = start(
        engines,
        model,
        "keydiff",
        max_num_batched_tokens=200,
        enable_prefix_caching=True,
    )
    for is_cached in (False, True):
        found = [sharing.generate([prompt], STEPS, **marked(one))[0] for one in texts]
        assert_same(found, expected)
        assert all((reply.cached > 0) == is_cached for reply in found)


@pytest.mark.parametrize("text", ["", "0-", "9-9", "5-3", "0-5,", 7, ["0-5"], "a-b"])
def test_what_is_no_span_is_refused(
    engines: EngineSlot, model: Model, text: object
) -> None:
    engine = start(engines, model, "sink-recent")
    with pytest.raises(UserError):
        engine.add([5, 6, 7], 4, extra_args={"kv_protect": text})
    with pytest.raises(UserError, match=r"^70-90: policy sink-recent can protect"):
        engine.add([5, 6, 7], 4, **marked("0-5,70-90"))
    assert engine.generate([[5, 6, 7]], 4)
