# SPDX-License-Identifier: Apache-2.0
"""Policies that select after a dense prefill: kept tokens, logits, pages, order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kvserve.errors import UserError
from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, EngineSlot, random_prompts
from tests.engine.test_oracle import TOLERANCE, relative_error
from tests.reference.dense_model import DenseLlama
from tests.reference.dense_policies import (
    H2OReference,
    Reference,
    SnapKVReference,
    TaskKVReference,
)

pytestmark = pytest.mark.engine

STEPS = 64
RUNS = {
    "batch 1, in one chunk": ([333], 1024),
    "batch 1, chunks of 512": ([700], 512),
    "ragged batch 4, chunks of 64": ([129, 401, 257, 310], 64),
}
_H2O = {"heavy": 40, "recent": 48}
_TASK = {"budget": 0.5, "beta": 0.5, "m": 1, "sinks": 8, "recent": 40}
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("snapkv", {"capacity": 100, "window": 16}),
    "snapkv, bounded": (
        "snapkv",
        {"capacity": 100, "window": 16, "bounded_tail": True, "recent": 40},
    ),
    "h2o": ("h2o", _H2O),
    "h2o by shares": ("h2o", {"heavy_ratio": 0.1, "recent_ratio": 0.1, "reply": 100}),
    "h2o by count": ("h2o", {**_H2O, "norm": "count"}),
    "h2o after prefill": ("h2o", {**_H2O, "decode": False}),
    "heterogeneous": ("heterogeneous", _TASK),
    "heterogeneous, bounded": ("heterogeneous", {**_TASK, "bounded_tail": True}),
}
CASES = pytest.mark.parametrize("case", ARGUMENTS)
SCORING = ["tiny-sinks", "tiny-cap", "tiny-alibi", "tiny-mixed"]


def reference_of(case: str, model: Model) -> Reference:
    _, values = ARGUMENTS[case]
    if case == "h2o by shares":
        return H2OReference(shares=(0.1, 0.1), reply=100)
    if case.startswith("h2o"):
        return H2OReference(
            values["heavy"],
            values["recent"],
            count=values.get("norm") == "count",
            decode=values.get("decode", True),
        )
    if case.startswith("snapkv"):
        ring = values["recent"] if values.get("bounded_tail") else 0
        return SnapKVReference(values["capacity"], values["window"], ring=ring)
    return TaskKVReference(
        num_layers=model.shape.open.num_layers,
        budget=str(values["budget"]),
        beta=str(values["beta"]),
        m=values["m"],
        sinks=values["sinks"],
        recent=values["recent"],
        bounded_tail=values.get("bounded_tail", False),
    )


@pytest.mark.parametrize(
    ("name", "run", "case"),
    [
        *itertools.product(["tiny-mha", "tiny-gqa"], RUNS, ARGUMENTS),
        *(("tiny-mqa", list(RUNS)[2], case) for case in ("snapkv", "h2o")),
        ("tiny-mqa", list(RUNS)[2], "heterogeneous"),
        *itertools.product(
            ["tiny-window"],
            list(RUNS)[2:],
            ["snapkv, bounded", "h2o by shares", "heterogeneous"],
        ),
        ("tiny-sinks", list(RUNS)[2], "h2o"),
        ("tiny-cap", list(RUNS)[2], "snapkv"),
        ("tiny-alibi", list(RUNS)[2], "heterogeneous"),
        ("tiny-mixed", list(RUNS)[2], "h2o"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *itertools.product(SCORING, [list(RUNS)[1]], ["snapkv", "h2o"]),
                *itertools.product(SCORING, [list(RUNS)[1]], ["heterogeneous"]),
                *itertools.product(["tiny-window"], [list(RUNS)[1]], ARGUMENTS),
            ]
        ),
    ],
)
def test_kept_tokens_and_logits_are_those_of_the_reference(
    engines: EngineSlot, models: dict[str, Model], name: str, run: str, case: str
) -> None:
    model, (lengths, chunk) = models[name], RUNS[run]
    policy, values = ARGUMENTS[case]
    engine = engines.start(
        model.path,
        policy,
        values,
        max_num_batched_tokens=chunk,
        logprobs_mode="raw_logits",
    )
    prompts = random_prompts(lengths, model.vocab, seed=len(lengths))
    names = [engine.add(prompt, STEPS, logprobs=-1) for prompt in prompts]
    held = {}
    while engine.is_busy:
        held.update(engine.retained())
        engine.step()
    oracle, reference = DenseLlama(model.path), reference_of(case, model)
    for request, prompt in zip(names, prompts, strict=True):
        reply = engine.replies.pop(request)
        tokens = prompt + reply.tokens[:-1]
        found = torch.stack(reply.logits)
        expected, _ = oracle.reply_logits(tokens, len(prompt), reference)
        assert relative_error(found, expected).max() < TOLERANCE
        assert expected.argmax(dim=1).tolist() == reply.tokens
        length, kept_by_all = held[request]
        kept = [*model.shape.open.own(kept_by_all)]
        _, should = oracle.reply_logits(tokens[:length], len(prompt), reference)
        assert kept == should
        for local, lanes in zip(model.shape.local, kept_by_all, strict=False):
            if local:
                last = set(range(max(length - local.tokens, 0), length))
                assert lanes == [last] * model.shape.num_kv_heads


@pytest.mark.parametrize("case", ["snapkv", "h2o", "heterogeneous"])
def test_chunks_are_refused_in_one_line(
    engines: EngineSlot, models: dict[str, Model], case: str
) -> None:
    policy, values = ARGUMENTS[case]
    with pytest.raises(UserError, match=f"^--policy {policy}: ") as refused:
        engines.start(models["tiny-chunk"].path, policy, values)
    assert "a chunk of 96 tokens" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *itertools.product(["tiny-gqa"], ARGUMENTS),
        *itertools.product(["tiny-window"], ["h2o", "heterogeneous, bounded"]),
    ],
)
def test_a_reply_depends_on_neither_chunks_nor_neighbours_nor_preemption(
    engines: EngineSlot, models: dict[str, Model], name: str, case: str
) -> None:
    model = models[name]
    policy, values = ARGUMENTS[case]
    prompts = random_prompts([333, 90, 217], model.vocab, seed=3)
    alone = []
    engine = engines.start(model.path, policy, values, max_num_batched_tokens=1024)
    for prompt in prompts:
        alone += engine.generate([prompt], 40)
    expected = [reply.tokens for reply in alone]
    together = engine.generate(prompts[::-1], 40)[::-1]
    assert [reply.tokens for reply in together] == expected
    for chunk in (64, 200):
        engine = engines.start(model.path, policy, values, max_num_batched_tokens=chunk)
        names = [engine.add(prompt, 40) for prompt in prompts]
        for _ in range(25):
            engine.step()
        engine.preempt_all()
        engine.finish()
        replies = [engine.replies.pop(name) for name in names]
        assert [reply.tokens for reply in replies] == expected
        assert any(reply.preemptions for reply in replies)
        assert engine.pages_held == {}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *itertools.product(["tiny-gqa"], ARGUMENTS),
        *itertools.product(["tiny-window"], ["h2o", "snapkv"]),
    ],
)
def test_pages_held_are_those_of_the_plan(
    engines: EngineSlot, models: dict[str, Model], name: str, case: str
) -> None:
    model = models[name]
    policy, values = ARGUMENTS[case]
    engine = engines.start(model.path, policy, values, max_num_batched_tokens=128)
    plan = engine.rule.plan(400)
    (prompt,) = random_prompts([400], model.vocab, seed=1)
    request = engine.add(prompt, 100)
    free = engine.pages_for_requests
    engine.step()
    while engine.is_busy:
        tokens = engine.scheduler.requests[request].num_computed_tokens
        held = [page for page in engine.pages_held[request] if page]
        # Pages of what did not survive are freed by the step that follows.
        pages = plan.prompt_entries if tokens == 400 else plan.pages(tokens)
        assert len(held) == len(set(held)) == pages
        assert engine.pool.get_num_free_blocks() == free - pages
        engine.step()
    assert engine.pool.get_num_free_blocks() == free
    full = engine.rule.full.pages(500)
    assert plan.pages(500) < full * 0.8


def test_two_prompts_that_cannot_both_be_dense_run_one_after_the_other(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    policy, values = ARGUMENTS["h2o"]
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    engine = engines.start(model.path, policy, values, **options)
    prompts = random_prompts([900, 900, 900], model.vocab, seed=2)
    expected = [engine.generate([prompt], 8)[0].tokens for prompt in prompts]
    page_bytes = 2 * PAGE * model.shape.head_size * 4
    pages = engine.rule.full.pages(900) * 3 // 2
    # A pool that holds one dense prefill and several settled requests.
    engine = engines.start(
        model.path,
        policy,
        values,
        **options,
        max_model_len=960,
        kv_cache_memory_bytes=pages * page_bytes,
    )
    replies = engine.generate(prompts, 8)
    assert [reply.tokens for reply in replies] == expected
    assert not any(reply.preemptions for reply in replies)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "heterogeneous"])
def test_a_budget_of_the_whole_sequence_is_stock_vllm(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    model = models["tiny-gqa"]
    prompts = random_prompts([3, 64, 333, 700], model.vocab, seed=4)
    options = {"max_num_batched_tokens": 200, "kv_cache_memory_bytes": 256 * MIB}
    stock = engines.start(model.path, None, None, **options).generate(prompts, 32)
    everything = {
        "snapkv": {"capacity": 1024},
        "h2o": {"heavy": 1000, "recent": 100},
        "heterogeneous": {"budget": 1.0},
    }
    engine = engines.start(model.path, policy, everything[policy], **options)
    ours = engine.generate(prompts, 32)
    assert [reply.tokens for reply in ours] == [reply.tokens for reply in stock]
