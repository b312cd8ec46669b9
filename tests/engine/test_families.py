# SPDX-License-Identifier: Apache-2.0
"""Every family of models: ``full`` gives what stock vLLM gives, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvserve.errors import UserError
from tests.engine.families import FAMILIES
from tests.engine.harness import PAGE, Engine, EngineSlot, Reply, random_prompts
from tests.engine.test_identity import assert_identical, is_tie, parted
from tests.reference.families import VOCAB, Family

pytestmark = pytest.mark.engine

STEPS = 24
PROMPTS = random_prompts([17, 100, 311, 600], VOCAB, seed=1)
"""Shorter than every window and longer; the last is read in two chunks."""


_ALIKE = {
    *("llama", "qwen3", "gpt2", "falcon", "olmo3", "exaone4", "mimo-v2"),
    *("falcon-alibi", "granite4", "nemotron-h", "gemma4"),
}
"""Families whose layers are of kinds that others show as well: they take their turn
where all tests run."""
SERVED = [
    pytest.param(
        family, marks=pytest.mark.slow if family.name in _ALIKE else (), id=str(family)
    )
    for family in FAMILIES
    if family.served
]
REFUSED = [family for family in FAMILIES if not family.served]


def kinds_of(engine: Engine) -> tuple[str, ...]:
    """Name the kinds of all layers that cache something, in the model's order."""
    names = list(engine.layers)
    kinds = []
    for layer, spec in engine.layers.values():
        impl = getattr(layer, "impl", None)
        target = getattr(layer, "kv_sharing_target_layer_name", None)
        marks = {
            f", shares {names.index(target) if target else ''}": target,
            ", cap": getattr(impl, "logits_soft_cap", None),
            ", alibi": getattr(impl, "alibi_slopes", None) is not None,
            ", sink": getattr(impl, "sinks", None) is not None,
        }
        found = "".join(mark for mark, present in marks.items() if present)
        kinds.append(_seen(spec) + found)
    return tuple(kinds)


def _seen(spec: Any) -> str:
    """Name what a query of a layer sees."""
    match type(spec).__name__:
        case "FullAttentionSpec":
            return "full"
        case "SlidingWindowSpec":
            return f"window {spec.sliding_window}"
        case "ChunkedLocalAttentionSpec":
            return f"chunk {spec.attention_chunk_size}"
        case "MambaSpec":
            return str(spec.mamba_type.name).lower()
    return "latent"


def assert_same(found: list[Reply], expected: list[Reply], family: Family) -> None:
    """In bfloat16 replies may part where rounding cannot order two tokens."""
    if family.dtype == "float32":
        assert_identical(found, expected, family.within)
    else:
        for ours, theirs in parted(found, expected):
            assert is_tie(ours, theirs, theirs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Writes each model once: vLLM compiles some classes of transformers in place.

    They can be made outside an engine no more.
    """
    folder, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def write(family: Family) -> Path:
        if family.name not in made:
            made[family.name] = family.write(folder)
        return made[family.name]

    return write


@pytest.mark.parametrize("family", REFUSED, ids=str)
def test_what_is_not_served_is_refused_in_one_line(
    engines: EngineSlot, tmp_path: Path, family: Family
) -> None:
    model = family.write(tmp_path)
    with pytest.raises(UserError) as refused:
        engines.start(model, "full", **{**family.engine_options, "block_size": PAGE})
    said = str(refused.value)
    assert said.startswith(f"MODEL {model}: ")
    assert said.endswith("serve it with stock vLLM (`--policy none`)")
    assert "\n" not in said


@pytest.mark.parametrize("family", SERVED)
def test_full_is_stock_vllm(
    engines: EngineSlot, written: Callable[[Family], Path], family: Family
) -> None:
    model = written(family)
    stock = engines.start(model, None, **family.engine_options)
    expected = stock.generate(PROMPTS, STEPS)
    engine = engines.start(model, "full", **family.engine_options)
    assert_same(engine.generate(PROMPTS, STEPS), expected, family)


@pytest.mark.parametrize(
    "family",
    [row for row in SERVED if row.id in ("gemma3n", "gemma4", "gemma4-unequal")],
)
def test_a_window_beside_those_of_the_model_depends_on_no_chunk(
    engines: EngineSlot, written: Callable[[Family], Path], family: Family
) -> None:
    model = written(family)
    options, expected = dict(family.engine_options), None
    for chunk in (1024, 200, 64):
        options["max_num_batched_tokens"] = chunk
        values = {"sinks": 32, "recent": 64}
        engine = engines.start(model, "sink-recent", values, **options)
        names = [engine.add(prompt, STEPS) for prompt in PROMPTS]
        for _ in range(12):
            engine.step()
        if expected is not None:
            engine.preempt_all()
        engine.finish()
        replies = [engine.replies.pop(name) for name in names]
        expected = expected or replies
        assert_same(replies, expected, family)
        assert engine.pages_held == {}
    assert any(reply.preemptions for reply in replies)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_stock_vllm_serves_layers_of_these_kinds(
    engines: EngineSlot, written: Callable[[Family], Path], family: Family
) -> None:
    """Or the rows above would compare nothing that their names promise."""
    engine = engines.start(written(family), None, **family.engine_options)
    assert kinds_of(engine) == family.kinds
    together = engine.generate(PROMPTS, STEPS)
    # A model that ever repeats itself would not tell what a head has seen.
    assert all(len(set(reply.tokens)) > STEPS // 6 for reply in together)
    assert_same(engine.generate(PROMPTS, STEPS), together, family)
    if family.steady:
        alone = [engine.generate([prompt], STEPS)[0] for prompt in PROMPTS]
        assert_same(alone, together, family)
