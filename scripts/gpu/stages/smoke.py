# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM, then ``full``: 32 tokens each, from SmolLM2 if its weights are there."""

from __future__ import annotations

import time
from typing import Any

from scripts.gpu.stages.common import EngineSpec, Stage, stage_main
from scripts.gpu.stages.shapes import DUMMY, write_shape

TOKENS = 32
PROMPT_TOKENS = 48


def model_of(stage: Stage) -> tuple[str, dict[str, Any]]:
    """The embedded model, or its shape with random weights where it has not come."""
    from kvserve.errors import UserError
    from kvserve.models import embedded_model, gguf_file

    try:
        gguf_file()
    except UserError:
        return str(write_shape(stage.folder, "smollm2-135m")), dict(DUMMY)
    return str(embedded_model()), {}


def engines(stage: Stage) -> dict[str, EngineSpec]:
    model, options = model_of(stage)
    options |= {"max_model_len": 1024, "max_num_batched_tokens": 1024}
    return {
        "stock": EngineSpec(model, None, {}, options),
        "full": EngineSpec(model, "full", {}, options),
    }


def prompts() -> list[list[int]]:
    from tests.engine.harness import random_prompts

    return random_prompts([PROMPT_TOKENS, 5], 1000, seed=0)


def run(stage: Stage) -> None:
    from tests.engine.test_identity import is_tie, parted

    replies = {}
    for name, spec in engines(stage).items():
        start = time.perf_counter()
        with stage.engine(spec) as engine:
            started = time.perf_counter()
            replies[name] = engine.generate(prompts(), TOKENS)
            ended = time.perf_counter()
        tokens = [reply.tokens for reply in replies[name]]
        assert all(len(reply) == TOKENS for reply in tokens)
        seconds = {"start_s": started - start, "reply_s": ended - started}
        rounded = {key: round(value, 2) for key, value in seconds.items()}
        stage.note(**{name: {**rounded, "tokens": tokens[0]}})
    random = "load_format" in spec.options
    stage.note(weights="random" if random else "SmolLM2")
    if not random:  # random logits are all but equal, and part anywhere
        different = parted(replies["full"], replies["stock"])
        stage.note(parted=len(different))
        if not all(is_tie(*pair) for pair in different):
            stage.fail("full parts from stock where nothing is tied")


if __name__ == "__main__":
    stage_main(run, engines, lambda _: prompts())
