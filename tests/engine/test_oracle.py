# SPDX-License-Identifier: Apache-2.0
"""The engine computes what a dense model with the policy's masks computes.

Evicting a page and masking its tokens must be the same thing: the logits of 64 decode
steps are compared with those of one dense, masked, float32 forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from policies.base import FULL
from tests.engine.conftest import SCORING, Model
from tests.engine.harness import PAGE, EngineSlot, random_prompts
from tests.reference.masked_model import Budgets, MaskedLlama
from tests.reference.thinning import JUDGES

pytestmark = pytest.mark.engine

STEPS = 64
TOLERANCE = 1e-4
BATCHES = {"batch 1": [333], "ragged batch 4": [129, 601, 257, 410]}
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("sink-recent", {"sinks": 32, "recent": 64}),
    ("retrieval", {"sinks": 32, "recent": 96, "full_ratio": 0.3}),
    ("moa", {"length": 1024}),
    ("moa", {}),
    ("sharded", {"local_blocks": 2, "stride": 4, "step": 1}),
    ("sharded", {"local_blocks": 3, "stride": 4, "pattern": "query"}),
    ("sharded", {"local_blocks": 1, "stride": 3, "dense_every": 2, "offset": 0}),
    ("knorm", {"budget": 0.5, "recent": 64, "group": 32, "length": 500}),
    ("keydiff", {"budget": 0.5, "recent": 32, "group": 96, "length": 500}),
]
# The large model takes longest; small ones tell patterns and fixed lengths apart.
LONG = [
    policy for policy in POLICIES if policy[0] == "sharded" or "length" in policy[1]
]
CASES = [
    pytest.param(
        model,
        policy,
        values,
        id=f"{model}-{', '.join([policy, *values])}",
        marks=pytest.mark.slow
        if model == "smollm2" and ((policy, values) in LONG or policy == "sink-recent")
        else (),
    )
    for model in ("tiny-mha", "tiny-gqa", "smollm2")
    for policy, values in POLICIES
] + [
    pytest.param(name, policy, values, id=f"{name}-{', '.join([policy, *values])}")
    for name, policies in (
        ("tiny-mqa", POLICIES[:2]),
        ("tiny-window", [("full", {}), *POLICIES[1:3], POLICIES[4], POLICIES[-1]]),
    )
    for policy, values in policies
]


@pytest.fixture(scope="module")
def oracles(models: dict[str, Model]) -> dict[str, MaskedLlama]:
    return {name: MaskedLlama(model.path) for name, model in models.items()}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(("name", "policy", "values"), CASES)
def test_logits_are_those_of_the_masked_model(
    engines: EngineSlot,
    models: dict[str, Model],
    oracles: dict[str, MaskedLlama],
    name: str,
    policy: str,
    values: dict[str, Any],
    lengths: list[int],
) -> None:
    check_logits(engines, models[name], oracles[name], policy, values, lengths, PAGE)


STREAMING = {
    "full": ("full", {}),
    **{policy: (policy, values) for policy, values in [*POLICIES[:2], *POLICIES[3:5]]},
}
# Every model and every policy once; all pairs where all tests run.
ONCE = {
    ("tiny-sinks", "moa"),
    ("tiny-cap", "sharded"),
    ("tiny-alibi", "sink-recent"),
    ("tiny-chunk", "retrieval"),
    ("tiny-mixed", "full"),
}


@pytest.mark.parametrize(
    ("name", "policy", "values"),
    [
        pytest.param(
            one.name,
            *STREAMING[policy],
            id=f"{one.name}-{policy}",
            marks=() if (one.name, policy) in ONCE else pytest.mark.slow,
        )
        for one in SCORING
        for policy in STREAMING
    ],
)
def test_scores_that_are_not_only_products_are_those_of_the_masked_model(
    engines: EngineSlot,
    models: dict[str, Model],
    oracles: dict[str, MaskedLlama],
    name: str,
    policy: str,
    values: dict[str, Any],
) -> None:
    lengths = [129, 410, 257]
    check_logits(engines, models[name], oracles[name], policy, values, lengths, PAGE)


@pytest.mark.parametrize("name", ["tiny-sinks", "tiny-cap", "tiny-alibi", "tiny-chunk"])
def test_the_oracle_tells_scores_apart(
    models: dict[str, Model], oracles: dict[str, MaskedLlama], name: str
) -> None:
    """Or the test above would pass an engine that knows products alone."""
    model, right = models[name], oracles[name]
    wrong = MaskedLlama(model.path)
    everything = (None,) * model.shape.num_layers
    wrong.shape = replace(wrong.shape, soft_cap=0.0, slopes=(), local=everything)
    wrong.forget_sinks()
    (prompt,) = random_prompts([333], model.vocab, seed=5)
    budgets = ((FULL,) * model.shape.num_kv_heads,) * model.shape.num_layers
    found, expected = (one.logits(prompt, budgets, PAGE, 300) for one in (wrong, right))
    assert relative_error(found, expected).median() > 100 * TOLERANCE


@pytest.mark.parametrize("page_size", [PAGE, 2 * PAGE])
def test_one_page_of_sinks_and_one_recent_page_are_enough(
    engines: EngineSlot,
    models: dict[str, Model],
    oracles: dict[str, MaskedLlama],
    page_size: int,
) -> None:
    check_logits(
        engines,
        models["tiny-gqa"],
        oracles["tiny-gqa"],
        "retrieval",
        {"sinks": 1, "recent": 1, "full_ratio": 0.34},
        [129, 301],
        page_size,
    )


def check_logits(
    engines: EngineSlot,
    model: Model,
    oracle: MaskedLlama,
    policy: str,
    values: dict[str, Any],
    lengths: list[int],
    page_size: int,
) -> None:
    """Let the engine answer, then ask the oracle for the same tokens' logits."""
    policy_args = model.policy_args(policy, **values)
    engine = engines.start(
        model.path,
        policy,
        policy_args,
        block_size=page_size,
        max_num_batched_tokens=200,
        logprobs_mode="raw_logits",
    )
    prompts = random_prompts(lengths, model.vocab, seed=len(lengths))
    replies = engine.generate(prompts, STEPS, logprobs=-1)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert len(reply.tokens) == STEPS
        tokens, first = prompt + reply.tokens[:-1], len(prompt) - 1
        found = torch.stack(reply.logits)
        budgets = model.budgets(policy, policy_args, len(prompt) + STEPS)
        judge = JUDGES.get(policy)
        expected = oracle.logits(tokens, budgets, page_size, first, judge)
        assert relative_error(found, expected).max() < TOLERANCE
        assert expected.argmax(dim=1).tolist() == reply.tokens


@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa"])
@pytest.mark.parametrize("change", ["no eviction", "one page more", "other heads"])
def test_the_oracle_tells_budgets_apart(
    models: dict[str, Model],
    oracles: dict[str, MaskedLlama],
    name: str,
    change: str,
) -> None:
    model = models[name]
    values = {"sinks": 32, "recent": 96, "full_ratio": 0.3}
    budgets = model.budgets("retrieval", model.policy_args("retrieval", **values))
    wider = {**values, "recent": 96 + PAGE}
    changed: dict[str, Budgets] = {
        "no eviction": ((FULL,) * model.shape.num_kv_heads,) * len(budgets),
        "one page more": model.budgets(
            "retrieval", model.policy_args("retrieval", **wider)
        ),
        "other heads": tuple(layer[::-1] for layer in budgets),
    }
    (prompt,) = random_prompts([333], model.vocab, seed=5)
    right, wrong = (
        oracles[name].logits(prompt, choice, PAGE, first=300)
        for choice in (budgets, changed[change])
    )
    assert relative_error(wrong, right).median() > 100 * TOLERANCE


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Largest deviation at each position over the largest logit there, ``[n]``."""
    largest = expected.abs().amax(dim=1)
    return (found - expected).abs().amax(dim=1) / largest
