# SPDX-License-Identifier: Apache-2.0
"""``full`` over pages of bytes: what it says beside pages of the model's own type."""

from __future__ import annotations

from scripts.gpu.stages.common import EngineSpec, Stage, stage_main
from scripts.gpu.stages.identity import SMALL_LENGTHS, prompts

TYPES = ("auto", "int8_per_token_head", "fp8_per_token_head")
STEPS = 16


def engines(stage: Stage) -> dict[str, EngineSpec]:
    from kvserve.models import embedded_model

    model = str(embedded_model())
    options = {
        "max_model_len": 6200 if stage.on_gpu else max(SMALL_LENGTHS) + STEPS,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 1 << 30,
    }
    return {
        stored: EngineSpec(
            model,
            "full",
            {},
            {**options, "kv_cache_dtype": stored},
            is_wanted=stored != "auto",
        )
        for stored in TYPES
    }


def run(stage: Stage) -> None:
    asked, expected = prompts(stage), None
    for stored, spec in engines(stage).items():
        with stage.attempt(stored), stage.engine(spec) as engine:
            replies = [reply.tokens for reply in engine.generate(asked, STEPS)]
            expected = expected or replies
            pairs = [
                ours == theirs
                for reply, other in zip(replies, expected, strict=True)
                for ours, theirs in zip(reply, other, strict=True)
            ]
            stage.note(**{stored: {"tokens_as_auto": sum(pairs) / len(pairs)}})


if __name__ == "__main__":
    stage_main(run, engines, prompts)
