# SPDX-License-Identifier: Apache-2.0
"""500 requests that end in every way, on a pool too small for them: no page stays."""

from __future__ import annotations

import itertools
import time
from typing import Any

from scripts.gpu.stages.common import EngineSpec, Stage, stage_main

REQUESTS, SMALL_REQUESTS = 500, 40
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "retrieval": {"sinks": 32, "recent": 64, "full_ratio": 0.34},
    "h2o": {"heavy": 32, "recent": 32},
}


def engines(stage: Stage) -> dict[str, EngineSpec]:
    from tests.engine.conftest import tiny_model
    from tests.engine.test_no_leak import CHUNK
    from tests.reference.models import MHA

    model = tiny_model(MHA, stage.folder)
    options = {
        "max_model_len": 384,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 12,
        "kv_cache_memory_bytes": 3 << 20,
        "dtype": "float32",
    }
    return {
        name: EngineSpec(
            str(model.path), name, model.policy_args(name, **values), options
        )
        for name, values in POLICIES.items()
    }


def run(stage: Stage) -> None:
    from tests.engine.test_no_leak import Load, random_jobs
    from tests.reference.models import MHA

    endless = itertools.chain.from_iterable(
        random_jobs(MHA.vocab_size) for _ in itertools.count()
    )
    jobs = list(itertools.islice(endless, REQUESTS if stage.on_gpu else SMALL_REQUESTS))
    for name, spec in engines(stage).items():
        with stage.attempt(name), stage.engine(spec) as engine:
            free = engine.pool.get_num_free_blocks()
            load, start = Load(engine, jobs), time.perf_counter()
            load.run()
            found = {
                "pages_held": free - engine.pool.get_num_free_blocks(),
                "requests_left": len(engine.scheduler.requests),
                "aborted": sum(load.aborted.values()),
                "preempted": sum(r.preemptions for r in engine.replies.values()),
                "seconds": round(time.perf_counter() - start, 1),
            }
            stage.note(**{name: found})
            if found["pages_held"] or found["requests_left"]:
                stage.fail(f"{name}: something was left behind")
            if stage.on_gpu and not (found["aborted"] and found["preempted"]):
                stage.fail(f"{name}: nothing was aborted or preempted")


if __name__ == "__main__":
    stage_main(run, engines)
