# SPDX-License-Identifier: Apache-2.0
"""Pages that a policy says it frees are free: in the pool, for other requests.

The expected number of pages is counted from the rule alone: one page for each block
that the last token still sees, in each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvserve.plan.page_plan import PagePlan
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, random_prompts
from tests.reference.masked_model import Budgets, visible

pytestmark = pytest.mark.engine

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"sinks": 32, "recent": 96},
    "retrieval": {"sinks": 64, "recent": 64, "full_ratio": 0.34},
    "moa": {"length": 1024},
    "sharded": {"local_blocks": 2, "stride": 4, "step": 1},
}
LONG_TOKENS = 8192
LONG_RETRIEVAL = {"sinks": 32, "recent": 224, "full_ratio": 0.2}


def pages_seen(budgets: Budgets, tokens: int) -> int:
    """Blocks that the last of ``tokens`` tokens sees, over all heads."""
    if tokens == 0:
        return 0
    seen = 0
    for budget in (head for layer in budgets for head in layer):
        keys = visible(budget, tokens, PAGE)[-1].nonzero()
        seen += len((keys // PAGE).unique())
    return seen


def check_pages(engine: Engine, expected: Sequence[int]) -> None:
    """Compare every request with ``expected[tokens]``, and the pool with their sum."""
    held = {name: pages for name, pages in engine.pages_held.items() if pages}
    requests = engine.scheduler.requests
    found = {name: len(pages) for name, pages in held.items()}
    computed = {name: requests[name].num_computed_tokens for name in requests}
    assert found == {name: expected[n] for name, n in computed.items() if n}
    engine.check_books()
    usage = engine.scheduler.kv_cache_manager.usage
    pages = sum(found.values())
    assert usage == pytest.approx(pages / engine.pages_for_requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa"])
def test_every_request_holds_the_pages_of_its_plan_at_every_step(
    engines: EngineSlot, models: dict[str, Model], name: str, policy: str
) -> None:
    model, longest = models[name], 500
    policy_args = model.policy_args(policy, **POLICIES[policy])
    budgets = model.budgets(policy, policy_args)
    plan = PagePlan.from_budgets(budgets, PAGE)
    expected = [plan.pages(tokens) for tokens in range(longest + 1)]
    for tokens, pages in enumerate(expected):
        # Shards pass through a window at their own pace, and its pages wait for them.
        spare = plan.num_lanes if policy == "sharded" else 0
        assert 0 <= pages - pages_seen(budgets, tokens) <= spare

    engine = engines.start(
        model.path,
        policy,
        policy_args,
        max_num_batched_tokens=100,
        kv_cache_memory_bytes=6 * MIB,
        max_num_seqs=6,
    )
    prompts = random_prompts([1, 32, 33, 150, 260, 400, 31, 64], model.vocab, seed=7)
    for prompt in prompts:
        engine.add(prompt, max_tokens=70)
    steps = 0
    while engine.is_busy:
        engine.step()
        check_pages(engine, expected)
        steps += 1
    assert steps > 70
    assert not engine.pages_held


def test_the_usage_gauge_is_the_share_of_pages_that_requests_hold(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    engine = engines.start(
        model.path,
        "sink-recent",
        POLICIES["sink-recent"],
        kv_cache_memory_bytes=8 * MIB,
        disable_log_stats=False,
    )
    for prompt in random_prompts([400] * 6, model.vocab, seed=8):
        engine.add(prompt, max_tokens=40)
    shares = []
    while engine.is_busy:
        engine.step()
        held = sum(map(len, engine.pages_held.values()))
        shares.append(held / engine.pages_for_requests)
        gauge = engine.gauge("vllm:kv_cache_usage_perc")
        assert gauge == pytest.approx(shares[-1])
    assert max(shares) == pytest.approx(6 * 24 / engine.pages_for_requests)


@pytest.mark.parametrize(
    "name", ["tiny-long", pytest.param("smollm2", marks=pytest.mark.slow)]
)
def test_a_pool_holds_four_times_the_long_requests_of_stock_vllm(
    engines: EngineSlot, models: dict[str, Model], name: str
) -> None:
    model = models[name]
    options = {
        "max_model_len": LONG_TOKENS,
        "kv_cache_memory_bytes": {"tiny-long": 64, "smollm2": 2048}[name] * MIB,
        "dtype": {"tiny-long": "float32", "smollm2": "bfloat16"}[name],
    }
    stock = engines.start(model.path, None, **options)
    stock_fits = stock.pages_for_requests // (LONG_TOKENS // PAGE)

    policy_args = model.policy_args("retrieval", **LONG_RETRIEVAL)
    budgets = model.budgets("retrieval", policy_args)
    heads = [head for layer in budgets for head in layer]
    assert sum(head.is_full for head in heads) * 5 == len(heads)
    engine = engines.start(model.path, "retrieval", policy_args, **options)
    fits = engine.pages_for_requests // pages_seen(budgets, LONG_TOKENS)
    assert stock_fits >= 2
    assert fits >= 4 * stock_fits


def test_the_long_requests_that_fit_run_at_once(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-long"]
    options = {"max_model_len": LONG_TOKENS, "kv_cache_memory_bytes": 44 * MIB}
    stock = engines.start(model.path, None, **options)
    stock_fits = stock.pages_for_requests // (LONG_TOKENS // PAGE)
    policy_args = model.policy_args("retrieval", **LONG_RETRIEVAL)
    engine = engines.start(
        model.path,
        "retrieval",
        policy_args,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        **options,
    )
    needed = pages_seen(model.budgets("retrieval", policy_args), LONG_TOKENS)
    fits = engine.pages_for_requests // needed
    assert fits >= 4 * stock_fits >= 8

    answer = 8 * fits
    prompts = random_prompts([LONG_TOKENS - answer] * fits, model.vocab, seed=9)
    names = [engine.add(prompt, answer) for prompt in prompts]
    most_at_once = 0
    while engine.is_busy:
        engine.step()
        decoding = sum(
            request.num_output_tokens > 0 for request in engine.scheduler.running
        )
        most_at_once = max(most_at_once, decoding)
    replies = [engine.replies.pop(name) for name in names]
    assert most_at_once == fits
    assert all(len(reply.tokens) == answer for reply in replies)
    assert not any(reply.preemptions for reply in replies)
