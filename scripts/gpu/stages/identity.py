# SPDX-License-Identifier: Apache-2.0
"""``full`` beside stock vLLM, and every policy beside its reference.

Replies may part where stock's own log probabilities are tied, as the tests of CPUs
judge it; then the repository's tests of policies run in float32.
"""

from __future__ import annotations

from importlib.resources import files

from scripts.gpu.stages.common import GRAPHS, EngineSpec, Stage, stage_main

LENGTHS = [17, 64, 333, 700, 1500, 2500, 4000, 6000]
SMALL_LENGTHS = [17, 64, 150]
STEPS = 64
ORACLES = ["tests/engine/test_oracle.py", "tests/engine/test_dense_policies.py"]
CHOSEN = (
    "(test_logits and tiny-gqa and ragged) or (kept_tokens and tiny-gqa and ragged) "
    "or whole_sequence"
)
SMALL_CHOSEN = "test_logits and tiny-gqa-sink and ragged"
ON_GPU = ["tests/kernels", "tests/engine/test_triton_engine.py"]


def engines(stage: Stage) -> dict[str, EngineSpec]:
    from kvserve.models import embedded_model

    model = str(embedded_model())
    longest = max(LENGTHS if stage.on_gpu else SMALL_LENGTHS)
    options = {
        "max_model_len": longest + STEPS,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": (4 if stage.on_gpu else 1) << 30,
    }
    found = {
        "stock, eager": EngineSpec(model, None, {}, options),
        "full, eager": EngineSpec(model, "full", {}, options),
    }
    if stage.on_gpu:
        graphs = {**options, **GRAPHS}
        found["stock, graphs"] = EngineSpec(model, None, {}, graphs)
        found["full, graphs"] = EngineSpec(model, "full", {}, graphs)
    return found


def prompts(stage: Stage) -> list[list[int]]:
    """Consecutive passages of a novel."""
    from transformers import AutoTokenizer

    from kvserve.models import embedded_model

    lengths = LENGTHS if stage.on_gpu else SMALL_LENGTHS
    novel = files("kvserve.texts") / "data" / "persuasion.txt"
    text = novel.read_text(encoding="utf-8")[: 8 * sum(lengths)]
    tokens = AutoTokenizer.from_pretrained(str(embedded_model()))(text)["input_ids"]
    found, start = [], 0
    for length in lengths:
        found.append(tokens[start : start + length])
        start += length
    assert [len(prompt) for prompt in found] == lengths
    return found


def run(stage: Stage) -> None:
    from tests.engine.test_identity import is_tie, parted

    asked, replies = prompts(stage), {}
    for name, spec in engines(stage).items():
        with stage.attempt(name), stage.engine(spec) as engine:
            replies[name] = engine.generate(asked, STEPS)
    for mode in ("eager", "graphs"):
        stock, full = replies.get(f"stock, {mode}"), replies.get(f"full, {mode}")
        if stock is None or full is None:
            continue
        different = parted(full, stock)
        ties = sum(is_tie(*pair) for pair in different)
        stage.note(
            **{mode: {"replies": len(full), "parted": len(different), "ties": ties}}
        )
        if ties < len(different):
            stage.fail(f"{mode}: full parts from stock where nothing is tied")
    chosen = CHOSEN if stage.on_gpu else SMALL_CHOSEN
    stage.note(policies=stage.pytest(ORACLES, "-k", chosen, "-m", "not slow"))
    if stage.on_gpu:
        stage.note(graphs_and_kernels=stage.pytest(ON_GPU, "-m", "gpu"))


def prepare(stage: Stage) -> None:
    prompts(stage)
    stage.pytest(ORACLES, "-k", CHOSEN, "-m", "not slow")


if __name__ == "__main__":
    stage_main(run, engines, prepare)
