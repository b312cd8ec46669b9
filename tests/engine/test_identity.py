# SPDX-License-Identifier: Apache-2.0
"""Where a policy evicts nothing, the engine gives what stock vLLM gives.

Stock vLLM runs with the same settings, so that what differs is the cache alone.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import pytest

from kvserve.processor import multiplies_bfloat16
from tests.engine.conftest import Model
from tests.engine.harness import MIB, EngineSlot, Reply, random_prompts

pytestmark = pytest.mark.engine

NUM_PROMPTS = 32
SHORTEST, LONGEST = 3, 4000
OF_A_REAL_MODEL = 600
"""The longest prompt of a real model, where the time of 4000 tokens is not there."""
MAX_TOKENS = 4096
STEPS = 16
LOGPROB_TOLERANCE = 1e-3
TIE = 0.25
"""Two steps of a bfloat16 logit between 16 and 32."""

WIDE: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"sinks": 32, "recent": MAX_TOKENS},
    "retrieval": {"sinks": 32, "recent": MAX_TOKENS},
    "moa": {"wide": True},
    "sharded": {"stride": 1},
}


@dataclass(frozen=True)
class Setting:
    """How an engine is run."""

    batch: int
    chunk: int
    eager: bool = True
    dtype: str = "float32"

    def __str__(self) -> str:
        mode = "eager" if self.eager else "compiled"
        return f"batch {self.batch}, chunk {self.chunk}, {mode}, {self.dtype}"

    @property
    def options(self) -> dict[str, Any]:
        return {
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": self.chunk,
            "enforce_eager": self.eager,
            "dtype": self.dtype,
            "max_model_len": MAX_TOKENS,
            "kv_cache_memory_bytes": 2048 * MIB,
        }


CROSS = [
    (policy, Setting(batch, chunk, eager))
    for policy, batch, chunk, eager in itertools.product(
        WIDE, (1, 8), (64, 512, 2048), (True, False)
    )
]
COVERING = [
    ("full", Setting(8, 64)),
    ("retrieval", Setting(8, 64)),
    ("sink-recent", Setting(1, 512)),
    ("full", Setting(1, 512)),
    ("retrieval", Setting(1, 2048)),
    ("moa", Setting(8, 64)),
    ("sharded", Setting(1, 512)),
    ("sink-recent", Setting(8, 2048, eager=False)),
]
"""Every value of every setting, and every policy."""


class Stock:
    """Replies of stock vLLM, run once for each model and setting."""

    def __init__(self, engines: EngineSlot) -> None:
        self._engines = engines
        self._replies: dict[tuple[Model, Setting, int], list[Reply]] = {}

    def replies(
        self, model: Model, setting: Setting, longest: int = LONGEST
    ) -> list[Reply]:
        key = model, setting, longest
        if key not in self._replies:
            engine = self._engines.start(model.path, None, **setting.options)
            self._replies[key] = engine.generate(prompts_of(model, longest), STEPS)
        return self._replies[key]


@pytest.fixture(scope="module")
def stock(engines: EngineSlot) -> Stock:
    return Stock(engines)


def prompts_of(model: Model, longest: int = LONGEST) -> list[list[int]]:
    """32 prompts of 3 tokens and more: a novel for a real model, noise for others."""
    ratio = (longest / SHORTEST) ** (1 / (NUM_PROMPTS - 1))
    lengths = [round(SHORTEST * ratio**place) for place in range(NUM_PROMPTS)]
    if model.vocab < 1000:
        return random_prompts(lengths, model.vocab, seed=1)
    from transformers import AutoTokenizer

    novel = files("kvserve.texts") / "data" / "persuasion.txt"
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    tokens = tokenizer(novel.read_text(encoding="utf-8")[: 8 * sum(lengths)])
    starts = itertools.accumulate(lengths, initial=0)
    return [
        tokens["input_ids"][start : start + length]
        for start, length in zip(starts, lengths, strict=False)
    ]


def run(
    engines: EngineSlot,
    model: Model,
    policy: str,
    setting: Setting,
    longest: int = LONGEST,
) -> list[Reply]:
    policy_args = model.policy_args(policy, **WIDE[policy])
    engine = engines.start(model.path, policy, policy_args, **setting.options)
    return engine.generate(prompts_of(model, longest), STEPS)


def assert_identical(
    found: list[Reply], expected: list[Reply], within: float = LOGPROB_TOLERANCE
) -> None:
    assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for step, (best, stock_best) in enumerate(
            zip(ours.best, theirs.best, strict=True)
        ):
            both = best.keys() & stock_best.keys()
            assert ours.tokens[step] in both
            for token in both:
                assert abs(best[token] - stock_best[token]) < within


def is_tie(found: Reply, expected: Reply, exact: Reply) -> bool:
    """Tell whether replies part at two tokens that rounding cannot order.

    Their distance is taken where nothing is rounded, if that reply comes so far.
    """
    pairs = zip(found.tokens, expected.tokens, strict=True)
    step, (ours, theirs) = next(
        (step, pair) for step, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    together = exact.tokens[:step] == expected.tokens[:step]
    best = exact.best[step] if together else expected.best[step]
    if ours not in best or theirs not in best:
        return False
    return abs(best[theirs] - best[ours]) <= TIE


def parted(*replies: list[Reply]) -> list[tuple[Reply, ...]]:
    """Replies to one prompt each, where the first two are not the same."""
    pairs = zip(*replies, strict=True)
    return [found for found in pairs if found[0].tokens != found[1].tokens]


def rounding(found: list[Reply], exact: list[Reply]) -> float:
    """How far log probabilities of the first token lie from exact ones, on average."""
    differences = [
        abs(reply.best[0][token] - logprob)
        for reply, truth in zip(found, exact, strict=True)
        for token, logprob in truth.best[0].items()
        if token in reply.best[0]
    ]
    assert len(differences) > NUM_PROMPTS
    return statistics.fmean(differences)


@pytest.mark.parametrize(("policy", "setting"), COVERING, ids=str)
def test_tokens_and_logprobs_are_stock_vllms(
    engines: EngineSlot,
    models: dict[str, Model],
    stock: Stock,
    policy: str,
    setting: Setting,
) -> None:
    model = models["tiny-gqa"]
    expected = stock.replies(model, setting)
    assert_identical(run(engines, model, policy, setting), expected)


@pytest.mark.parametrize("name", ["tiny-mqa", "tiny-minicpm3"])
def test_heads_are_those_of_the_layers(
    engines: EngineSlot, models: dict[str, Model], stock: Stock, name: str
) -> None:
    """One KV head for all queries, and more KV heads than the configuration names."""
    model, setting, longest = models[name], Setting(batch=8, chunk=512), 1200
    expected = stock.replies(model, setting, longest)
    assert_identical(run(engines, model, "full", setting, longest), expected)


@pytest.mark.parametrize(
    ("policy", "longest"),
    [
        ("full", OF_A_REAL_MODEL),
        pytest.param("full", LONGEST, marks=pytest.mark.slow),
        pytest.param("retrieval", LONGEST, marks=pytest.mark.slow),
    ],
)
def test_a_real_model_answers_as_under_stock_vllm(
    engines: EngineSlot,
    models: dict[str, Model],
    stock: Stock,
    policy: str,
    longest: int,
) -> None:
    model, setting = models["smollm2"], Setting(batch=8, chunk=512)
    expected = stock.replies(model, setting, longest)
    assert_identical(run(engines, model, policy, setting, longest), expected)


@pytest.mark.parametrize(
    "policy",
    [
        "full",
        pytest.param("sink-recent", marks=pytest.mark.slow),
        pytest.param("retrieval", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(
    not multiplies_bfloat16(), reason="takes half an hour without AVX-512"
)
def test_in_bfloat16_answers_part_at_ties_only(
    engines: EngineSlot, models: dict[str, Model], stock: Stock, policy: str
) -> None:
    model, setting = models["smollm2"], Setting(8, 512, dtype="bfloat16")
    longest = OF_A_REAL_MODEL
    expected = stock.replies(model, setting, longest)
    found = run(engines, model, policy, setting, longest)
    exact = stock.replies(model, replace(setting, dtype="float32"), longest)
    ours = parted(found, expected, exact)
    assert all(is_tie(*replies) for replies in ours)
    assert len(ours) < NUM_PROMPTS / 2
    # Ties fall as rounding has it, and stock vLLM parts from itself in other batches:
    # that ours does not round more is seen in the first token, before texts part.
    assert rounding(found, exact) < 1.25 * rounding(expected, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "setting"), CROSS, ids=str)
@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa", "smollm2"])
def test_every_setting_gives_what_stock_vllm_gives(
    engines: EngineSlot,
    models: dict[str, Model],
    stock: Stock,
    name: str,
    policy: str,
    setting: Setting,
) -> None:
    expected = stock.replies(models[name], setting)
    assert_identical(run(engines, models[name], policy, setting), expected)
