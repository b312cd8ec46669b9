# SPDX-License-Identifier: Apache-2.0
"""Numbers found in a haystack under half of the cache, as docs/performance.md has them.

The same prompts, model and budgets as the table there ("every policy at half"), which
was measured on a CPU.
"""

from __future__ import annotations

from scripts.gpu.stages.common import EngineSpec, Stage, stage_main

LENGTH, COUNT, OUTPUT = 2048, 8, 24
ON_A_CPU = {"retrieval": 1.0, "moa": 1.0, "snapkv": 0.88, "h2o": 0.25}
SMALL_LENGTH, SMALL_COUNT, SMALL = 512, 2, ("retrieval", "h2o")


def engines(stage: Stage) -> dict[str, EngineSpec]:
    from kvserve.evaluation.model import shape_of
    from kvserve.models import embedded_model
    from policies.budgets import PolicySpec

    model = str(embedded_model())
    length = LENGTH if stage.on_gpu else SMALL_LENGTH
    options = {
        "max_model_len": length + 128,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 2 << 30,
    }
    found = {}
    for name in ON_A_CPU if stage.on_gpu else SMALL:
        spec = PolicySpec.parse(f"{name}:budget=0.5")
        arguments = spec.arguments(length, shape_of(model))
        found[name] = EngineSpec(model, name, arguments, options)
    return found


def run(stage: Stage) -> None:
    from transformers import AutoTokenizer

    from benchmarks.needles import mean_score, prompts

    length, count = (LENGTH, COUNT) if stage.on_gpu else (SMALL_LENGTH, SMALL_COUNT)
    chosen = engines(stage)
    model = next(iter(chosen.values())).model
    needles = prompts(model, "numbers", length, count)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, spec in chosen.items():
        with stage.attempt(name), stage.engine(spec) as engine:
            ids = [needle.token_ids for needle in needles]
            replies = engine.generate(ids, OUTPUT, stop=["\n"], ignore_eos=False)
            texts = [tokenizer.decode(reply.tokens) for reply in replies]
            score = round(mean_score(needles, [t.split("\n")[0] for t in texts]), 2)
            stage.note(**{name: score})
            if stage.on_gpu and abs(score - ON_A_CPU[name]) > 0.01:
                stage.fail(f"{name}: {score}, on a CPU {ON_A_CPU[name]}")


def prepare(_: Stage) -> None:
    from benchmarks.needles import prompts
    from kvserve.models import embedded_model

    prompts(str(embedded_model()), "numbers", LENGTH, 2)


if __name__ == "__main__":
    stage_main(run, engines, prepare)
