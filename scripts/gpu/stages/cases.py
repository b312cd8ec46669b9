# SPDX-License-Identifier: Apache-2.0
"""Engines that are measured one after the other, each in a process of its own.

Stock vLLM runs as its users run it: under the model runner and the scheduling that it
chooses itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.gpu.stages.common import EngineSpec, Stage
from scripts.gpu.stages.shapes import DUMMY, SMALL, write_shape

STOCK = "none"


def run_cases(stage: Stage, module: str, cases: Iterable[str], limit: float) -> None:
    """Run ``module`` once for each case; note what each found.

    Args:
        limit: seconds of a case.
    """
    for case in cases:
        found = stage.folder / "case.json"
        found.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, "--found", str(found)]
        command += ["--case", case, "--device", "cuda" if stage.on_gpu else "cpu"]
        with stage.attempt(case):
            try:
                subprocess.run(command, check=True, timeout=limit)
            finally:
                if found.exists():
                    line: dict[str, Any] = json.loads(found.read_text())
                    for failure in line.pop("failures", []):
                        stage.fail(f"{case}: {failure}")
                    stage.note(**{case: line})


def large_model(stage: Stage, name: str = "llama-3.1-8b", **changes: Any) -> Path:
    """A shape with random weights; on a CPU a small one."""
    return write_shape(stage.folder, name, changes if stage.on_gpu else SMALL)


def named(stage: Stage, name: str, model: Path) -> str:
    """Give ``retrieval`` a profile: a model of random weights has none.

    Args:
        name: an engine, as ``benchmarks.engines`` names them.
    """
    if not name.startswith("retrieval"):
        return name
    from kvserve.evaluation.model import shape_of
    from tests.engine.harness import write_profile

    shape = shape_of(str(model))
    path = stage.folder / "profile.json"
    write_profile(path, shape.num_layers, shape.num_kv_heads)
    text, at, stored = name.partition("@")
    return f"{text},profile={path}{at}{stored}"


def spec_of(
    stage: Stage, name: str, model: Path, tokens: int, options: dict[str, Any]
) -> EngineSpec:
    """What an engine of this name is started with, for the rehearsal."""
    from kvserve.evaluation.model import shape_of
    from policies.budgets import PolicySpec

    policy, _, own = name.partition(":")
    options = {**DUMMY, **options}
    if policy == STOCK:
        options |= dict(pair.split("=", 1) for pair in own.split(",") if pair)
        return EngineSpec(str(model), None, {}, options)
    text, _, stored = named(stage, name, model).partition("@")
    spec = PolicySpec.parse(text)
    arguments = spec.arguments(tokens, shape_of(str(model)))
    options["kv_cache_dtype"] = stored or "auto"
    return EngineSpec(str(model), spec.name, arguments, options, bool(stored))


def namespace(**values: Any) -> argparse.Namespace:
    """Arguments of a benchmark, as its command would parse them."""
    return argparse.Namespace(**values)
