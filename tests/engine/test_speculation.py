# SPDX-License-Identifier: Apache-2.0
"""With guessed tokens requests get the replies that they get without."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import MIB, PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_identity import assert_identical
from tests.reference.adapters import write_adapter

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


def test_n_grams_of_the_text_are_accepted_and_refused(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    """As vLLM finds them, beside a request that asks for alternatives."""
    model = models["tiny-gqa"]
    prompts, expected = expected_of(engines, model, "retrieval")
    engine = start(engines, model, "retrieval", GUESSES, enable_prefix_caching=True)
    oracle = Oracle([])
    oracle.watch(engine)
    assert_identical(engine.generate(prompts, REPLY), expected)
    assert oracle.accepted > 20
    assert oracle.refused > 20
    check_empty(engine)


@pytest.mark.skipif(
    find_spec("arctic_inference") is None, reason="arctic-inference is not installed"
)
def test_suffixes_are_guessed_from(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    prompts, expected = expected_of(engines, model, "retrieval")
    suffix = {"method": "suffix", "num_speculative_tokens": GUESSES}
    engine = start(engines, model, "retrieval", 0, speculative_config=suffix)
    oracle = Oracle([])
    oracle.watch(engine)
    for _ in range(2):
        assert_identical(engine.generate(prompts, REPLY), expected)
    assert oracle.accepted > 20
    check_empty(engine)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("policy", ["sink-recent", "keydiff"])
def test_books_agree_after_every_step_of_preempted_and_aborted_requests(
    engines: EngineSlot, models: dict[str, Model], policy: str, shared: bool
) -> None:
    model = models["tiny-gqa"]
    prompts, expected = expected_of(engines, model, policy)
    engine = start(
        engines,
        model,
        policy,
        GUESSES,
        enable_prefix_caching=shared,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=2 * MIB,
    )
    texts = texts_of(prompts, expected)
    oracle = Oracle(texts)
    oracle.guess_for(engine)
    names = [engine.add(prompt, REPLY) for prompt in prompts]
    doomed = [engine.add(prompt, REPLY) for prompt in prompts[::2]]
    for step in itertools.count():
        if not engine.is_busy:
            break
        engine.step()
        if step % 7 == 3 and doomed:
            engine.abort(doomed.pop())
        if step == 60:
            engine.preempt_all()
        engine.check_books()
        check_tokens(engine)
    replies = [engine.replies.pop(name) for name in names]
    assert [r.tokens for r in replies] == [r.tokens for r in expected]
    assert sum(reply.preemptions for reply in replies) > 4
    assert oracle.accepted > 200
    assert oracle.refused > 200
    check_empty(engine)
    receipts = {one.request_id: one for one in engine.manager.ledger.receipts(())}
    seen = {text.tokens_seen for text in map(receipts.__getitem__, names)}
    assert seen == {len(text) - 1 for text in texts}


def check_tokens(engine: Engine) -> None:
    """Check that what a step has refused is in nobody's books."""
    for name, tokens in engine.manager.ledger.tokens.items():
        assert tokens == engine.scheduler.requests[name].num_computed_tokens


def test_a_reply_ends_at_its_length_and_at_its_stop_token_among_right_guesses(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model = models["tiny-gqa"]
    prompts, expected = expected_of(engines, model, "retrieval")
    engine = start(engines, model, "retrieval", GUESSES, enable_prefix_caching=True)
    Oracle(texts_of(prompts, expected)).guess_for(engine)
    for prompt, whole in zip(prompts, expected, strict=True):
        for length in (1, 2, 9):
            (reply,) = engine.generate([prompt], length)
            assert reply.tokens == whole.tokens[:length]
        stop = whole.tokens[23]
        (reply,) = engine.generate([prompt], REPLY, stop_token_ids=[stop])
        assert reply.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    check_empty(engine)


def test_pages_of_fewer_bits_are_written_anew(
    engines: EngineSlot, models: dict[str, Model]
) -> None:
    model, pages = models["tiny-gqa"], {"kv_cache_dtype": "int8_per_token_head"}
    prompts, expected = expected_of(engines, model, "retrieval", **pages)
    engine = start(engines, model, "retrieval", GUESSES, **pages)
    Oracle(texts_of(prompts, expected)).guess_for(engine)
    found = engine.generate(prompts, REPLY)
    # What lies between two of 255 values goes where the last bit has it.
    assert_identical(found, expected, within=0.01)


def test_adapters_guess_beside_each_other(
    engines: EngineSlot, models: dict[str, Model], tmp_path: Path
) -> None:
    model = models["tiny-gqa"]
    made = [write_adapter(model.path, tmp_path / f"{n}", n) for n in (1, 2)]
    adapters = [None, *made]
    prompts = prompts_of(model)[2:4]
    expected: list[list[int]] = []
    for guesses in (0, GUESSES):
        engine = start(
            engines, model, "retrieval", guesses, enable_lora=True, max_loras=2
        )
        if guesses:
            pairs = zip(prompts * len(adapters), expected, strict=True)
            oracle = Oracle([prompt + reply for prompt, reply in pairs])
            oracle.guess_for(engine)
        names = [
            engine.add(prompt, REPLY, adapter=adapter)
            for adapter in adapters
            for prompt in prompts
        ]
        engine.finish()
        found = [engine.replies.pop(name).tokens for name in names]
        expected = expected or found
        assert found == expected
    assert oracle.accepted > 100
    check_empty(engine)
