# SPDX-License-Identifier: Apache-2.0
"""Pages of fewer bits: the engine computes what a model with rounded keys computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.engine.conftest import Model
from tests.engine.harness import PAGE, EngineSlot, random_prompts
from tests.engine.test_dense_policies import ARGUMENTS, reference_of
from tests.engine.test_oracle import relative_error
from tests.reference.dense_model import DenseLlama
from tests.reference.masked_model import MaskedLlama
from tests.reference.quantised import CACHES

pytestmark = pytest.mark.engine

STEPS = 48
LENGTHS = [129, 401, 257]
RETRIEVAL = {"sinks": 32, "recent": 96, "full_ratio": 0.3}
STREAMING: dict[str, dict[str, Any]] = {"full": {}, "retrieval": RETRIEVAL, "moa": {}}
DENSE = ["snapkv", "h2o", "heterogeneous"]
INT8 = "int8_per_token_head"


def covering(cases: Sequence[str], thorough: str) -> list[Any]:
    """Pair one case with every type of page, the others with one; the rest is slow."""
    return [
        pytest.param(case, cache, marks=() if is_fast else pytest.mark.slow)
        for case, cache in itertools.product(cases, CACHES)
        for is_fast in [case == thorough or cache == INT8]
    ]


@pytest.mark.parametrize(
    ("name", "policy", "cache"),
    [
        *(
            pytest.param(name, *case.values, marks=case.marks)
            for name in ("tiny-gqa", "tiny-mha")
            for case in covering([*STREAMING], "retrieval")
        ),
        # Windows, sinks and soft caps as well.
        ("tiny-mixed", "retrieval", INT8),
        ("tiny-chunk", "full", INT8),
    ],
)
def test_logits_are_those_of_the_masked_model_with_rounded_keys_and_values(
    engines: EngineSlot, models: dict[str, Model], name: str, policy: str, cache: str
) -> None:
    model = models[name]
    policy_args = model.policy_args(policy, **STREAMING[policy])
    engine = engines.start(model.path, policy, policy_args, **options(cache))
    prompts = random_prompts(LENGTHS, model.vocab, seed=4)
    replies = engine.generate(prompts, STEPS, logprobs=-1)
    oracles = MaskedLlama(model.path, CACHES[cache]), MaskedLlama(model.path)
    for prompt, reply in zip(prompts, replies, strict=True):
        tokens, first = prompt + reply.tokens[:-1], len(prompt) - 1
        budgets = model.budgets(policy, policy_args, len(prompt) + STEPS)
        expected, unrounded = (
            oracle.logits(tokens, budgets, PAGE, first) for oracle in oracles
        )
        check(torch.stack(reply.logits), expected, unrounded)


@pytest.mark.parametrize(
    ("name", "case", "cache"),
    [
        *(
            pytest.param("tiny-gqa", *case.values, marks=case.marks)
            for case in covering(DENSE, "h2o")
        ),
        ("tiny-mixed", "h2o", INT8),
    ],
)
def test_policies_that_select_see_rounded_keys(
    engines: EngineSlot, models: dict[str, Model], name: str, case: str, cache: str
) -> None:
    model = models[name]
    engine = engines.start(model.path, *ARGUMENTS[case], **options(cache))
    (prompt,) = random_prompts([333], model.vocab, seed=1)
    (reply,) = engine.generate([prompt], STEPS, logprobs=-1)
    tokens, reference = prompt + reply.tokens[:-1], reference_of(case, model)
    expected, unrounded = (
        oracle.reply_logits(tokens, len(prompt), reference)[0]
        for oracle in (DenseLlama(model.path, CACHES[cache]), DenseLlama(model.path))
    )
    check(torch.stack(reply.logits), expected, unrounded)


def test_pages_of_bytes_are_shared_by_requests_that_begin_alike(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    policy_args = model.policy_args("retrieval", **RETRIEVAL)
    start, *ends = random_prompts([320, 40, 70, 90], model.vocab, seed=2)
    replies = []
    for sharing in (False, True):
        engine = engines.start(
            model.path,
            "retrieval",
            policy_args,
            **options(INT8),
            enable_prefix_caching=sharing,
        )
        found = [engine.generate([start + end], STEPS)[0] for end in ends]
        replies.append([reply.tokens for reply in found])
        assert [reply.cached for reply in found[1:]] == [320 * sharing] * 2
    assert replies[0] == replies[1]


def test_a_pool_of_bytes_has_more_pages(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    pages = {}
    for cache in ("auto", *CACHES):
        engine = engines.start(model.path, "full", **options(cache))
        pages[cache] = engine.pages_for_requests
    head = model.shape.head_size
    for cache, numbers, scales in (("bfloat16", 2, 0), (INT8, 1, 8)):
        ratio = (2 * head * 4) / (2 * head * numbers + scales)
        assert pages[cache] / pages["auto"] == pytest.approx(ratio, rel=0.01)


def options(cache: str) -> dict[str, Any]:
    return {
        "kv_cache_dtype": cache,
        "max_num_batched_tokens": 200,
        "logprobs_mode": "raw_logits",
    }


def check(found: torch.Tensor, expected: torch.Tensor, unrounded: torch.Tensor) -> None:
    """Compare logits with the rounded model's, and with what rounding changes.

    Engine and reference differ in a key's last bit, which now and then rounds it to
    another number: the more layers, the more often. Rounding in any other way would
    make an error as large as the effect. So may tokens be others where the reference
    has them nearly tied, and nowhere else.
    """
    error = relative_error(found, expected)
    effect = relative_error(found, unrounded).median()
    assert error.median() < effect / 5
    assert error.max() < effect
    chosen = expected.gather(1, found.argmax(dim=1, keepdim=True)).squeeze(1)
    best = expected.amax(dim=1)
    assert ((best - chosen) / expected.abs().amax(dim=1)).max() < effect / 5
