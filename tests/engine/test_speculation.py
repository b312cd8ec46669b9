# SPDX-License-Identifier: Apache-2.0
"""With guessed tokens requests get the replies that they get without."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_identity import assert_identical

pytestmark = pytest.mark.engine

POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink-recent": {"sinks": 32, "recent": 64},
    "retrieval": {"sinks": 32, "recent": 64, "full_ratio": 0.34},
    "moa": {},
    "sharded": {"local_blocks": 2, "stride": 4, "step": 1},
    "keydiff": {"budget": 0.6, "recent": 64, "group": 64, "length": 448},
    "knorm": {"budget": 0.5, "recent": 32, "group": 32, "length": 448},
}
"""In the last one a group leaves with the very token that fills it."""
GUESSES = 6
MANY = PAGE + 9
"""More than a block: one step's guesses may open two."""
LENGTHS = [5, 30, 61, 96, 150, 201, 260]
REPLY = 3 * PAGE + 11
LONGEST = 448


@dataclass
class Oracle:
    """Guesses what it knows that a request will say, and then something else.

    Attributes:
        texts: prompts with their replies.
        accepted, refused: guesses, as the scheduler counts them.
    """

    texts: list[list[int]]
    source: random.Random = field(default_factory=lambda: random.Random(7))
    accepted: int = 0
    refused: int = 0

    def watch(self, engine: Engine) -> None:
        """Count what becomes of an engine's guesses."""

        def counted(stats: Any, **counts: Any) -> Any:
            self.accepted += counts["num_accepted_tokens"]
            self.refused += counts["num_draft_tokens"] - counts["num_accepted_tokens"]
            return stats

        engine.scheduler.make_spec_decoding_stats = counted

    def guess_for(self, engine: Engine) -> None:
        """Take the place of an engine's proposer."""
        self.watch(engine)
        engine.model_runner.drafter.propose = self.propose

    def propose(
        self,
        most: int,
        sampled: list[list[int]],
        num_tokens: Any,
        tokens: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        found = []
        for row, new in enumerate(sampled):
            so_far = tokens[row, : num_tokens[row]].tolist()
            found.append(self._continue(so_far, most) if new else [])
        return found

    def _continue(self, so_far: list[int], most: int) -> list[int]:
        for text in self.texts:
            if text[: len(so_far)] == so_far:
                rest = text[len(so_far) :]
                right = self.source.randint(0, min(most, len(rest)))
                wrong = [8 + token % 40 for token in rest[right:most]]
                return rest[:right] + wrong[: self.source.randint(0, most)]
        return []


def start(
    engines: EngineSlot, model: Model, policy: str, guesses: int, **options: Any
) -> Engine:
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": guesses,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    given = {"speculative_config": speculative} if guesses else {}
    defaults = {
        "max_model_len": LONGEST,
        "max_num_seqs": 6,
        "kv_cache_memory_bytes": 16 * MIB,
    }
    return engines.start(
        model.path,
        policy,
        model.policy_args(policy, **POLICIES[policy]),
        **{**defaults, **given, **options},
    )


def prompts_of(model: Model) -> list[list[int]]:
    """Prompts of which some begin alike, and shorter ones that repeat themselves."""
    (stem,) = random_prompts([90], model.vocab, seed=3)
    own = random_prompts(LENGTHS, model.vocab, seed=4)
    (word,) = random_prompts([7], model.vocab, seed=5)
    return [*own, *(stem + ids[:30] for ids in own[:3]), word * 9]


def expected_of(
    engines: EngineSlot, model: Model, policy: str, **options: Any
) -> tuple[list[list[int]], list[Reply]]:
    plain = start(engines, model, policy, 0, **options)
    prompts = prompts_of(model)
    return prompts, plain.generate(prompts, REPLY)


def texts_of(prompts: list[list[int]], replies: list[Reply]) -> list[list[int]]:
    return [
        prompt + reply.tokens for prompt, reply in zip(prompts, replies, strict=True)
    ]


def check_empty(engine: Engine) -> None:
    engine.check_books()
    assert not engine.pages_held
    assert engine.pool.get_num_free_blocks() == engine.pages_for_requests


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(("tiny-gqa", policy) for policy in POLICIES),
        ("tiny-window", "retrieval"),
        ("tiny-chunk", "full"),
        ("tiny-alibi", "retrieval"),
    ],
)
def test_guessed_tokens_change_no_reply(
    engines: EngineSlot, models: dict[str, Model], name: str, policy: str
) -> None:
    """Whether prefixes are shared or not, and however many tokens are guessed."""
    model = models[name]
    prompts, expected = expected_of(engines, model, policy)
    for guesses, shared in ((GUESSES, True), (MANY, True), (GUESSES, False)):
        engine = start(
            engines,
            model,
            policy,
            guesses,
            enable_prefix_caching=shared,
            max_num_batched_tokens=64,
        )
        oracle = Oracle(texts_of(prompts, expected))
        oracle.guess_for(engine)
        assert_identical(engine.generate(prompts, REPLY), expected)
        assert oracle.accepted > 200
        assert oracle.refused > 200
        check_empty(engine)
        if shared:
            again = engine.generate(prompts, REPLY)
            assert_identical(again, expected)
            assert sum(reply.cached for reply in again) > 0
