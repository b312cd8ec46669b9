# SPDX-License-Identifier: Apache-2.0
"""What stages share: their arguments, the engines they start, what they find."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engine.harness import Engine

GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    # Graphs of whole decode steps alone: they take seconds, torch.compile a minute.
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}


@dataclass(frozen=True)
class EngineSpec:
    """An engine that a stage will start.

    Attributes:
        policy: its name, or ``None`` for stock vLLM.
        options: of ``vllm.LLM``.
        is_wanted: kvserve may refuse it still; the rehearsal takes that as an answer.
    """

    model: str
    policy: str | None
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_wanted: bool = False


class Stage:
    """A stage at work.

    Attributes:
        on_gpu: whether it runs on a GPU; on a CPU it does the same in small.
        rehearses: builds configurations and prompts, and runs nothing.
        folder: a folder of its own, gone when it ends.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.on_gpu: bool = arguments.device == "cuda"
        self.rehearses: bool = arguments.rehearse
        self.case: str | None = arguments.case
        self._path: Path = arguments.found
        self._found: dict[str, Any] = {}

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.on_gpu else "float32"

    def note(self, **values: Any) -> None:
        """Keep what was found so far, also if the stage is stopped later."""
        self._found.update(values)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".new")
        scratch.write_text(json.dumps(self._found), encoding="utf-8")
        scratch.replace(self._path)

    def fail(self, what: str) -> None:
        """Note a failure, and go on."""
        self.note(failures=[*self._found.get("failures", []), what])

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what goes wrong inside as a failure of ``what``, and go on."""
        import traceback

        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{what}: {type(error).__name__}: {str(error)[:400]}")

    @contextmanager
    def engine(self, spec: EngineSpec) -> Iterator[Engine]:
        """Start an engine, and close it."""
        from tests.engine.harness import Engine

        started = Engine(
            Path(spec.model),
            spec.policy,
            dict(spec.policy_args) or None,
            **{"dtype": self.dtype, **spec.options},
        )
        try:
            yield started
        finally:
            started.close()

    def pytest(self, tests: Sequence[str], *options: str) -> dict[str, Any]:
        """Run tests of the repository; return how many passed, and who did not."""
        if self.rehearses:
            options = (*options, "--collect-only")
        report = self.folder / "pytest.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *options, *tests]
        start = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL)
        found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
        found |= read_junit(report.read_text()) if report.exists() else {"passed": 0}
        if done.returncode or not (found["passed"] or self.rehearses):
            names = ", ".join(found.get("failed", [])) or f"exit {done.returncode}"
            self.fail(f"pytest {' '.join(tests)}: {names}")
        return found


def read_junit(text: str) -> dict[str, Any]:
    """Count the tests of a JUnit report that passed, and name those that failed."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(case.get("name", "?"))
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def rehearse(spec: EngineSpec) -> str:
    """Build what an engine would be started with; return what it would be.

    Raises:
        UserError: kvserve refuses the options.
    """
    from vllm.engine.arg_utils import EngineArgs

    from kvserve.engine.settings import PolicySettings
    from kvserve.engine.start.options import engine_options, prepare_environment
    from kvserve.engine.start.preflight import check_start
    from kvserve.errors import UserError

    defaults = {"dtype": "bfloat16", "enforce_eager": True, "block_size": 32}
    options = {"model": spec.model, **defaults, **spec.options}
    prepare_environment(options)
    if spec.policy is None:
        fields = {field.name for field in dataclasses.fields(EngineArgs)}
        known = {name: value for name, value in options.items() if name in fields}
        config = EngineArgs(**known).create_engine_config()
    else:
        settings = PolicySettings(spec.policy, dict(spec.policy_args))
        try:
            config = check_start(engine_options(settings, options))
        except UserError as refusal:
            if spec.is_wanted:
                return f"refused: {refusal}"
            raise
    runner = "V2" if config.use_v2_model_runner else "V1"
    mode = config.compilation_config.cudagraph_mode
    return f"{config.parallel_config.worker_cls}, {runner}, graphs {mode.name}"


def stage_main(
    run: Callable[[Stage], None],
    engines: Callable[[Stage], Mapping[str, EngineSpec]] | None = None,
    prepare: Callable[[Stage], object] | None = None,
) -> None:
    """Run a stage from the command line.

    Args:
        run: does its work.
        engines: every engine that it starts, for the rehearsal.
        prepare: what a rehearsal does besides, such as making prompts.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--case", help="of a stage that runs cases in own processes")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not (arguments.case or "").startswith("none"):
        # Of policies; stock vLLM beside them runs alike, unless it is timed.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if arguments.rehearse and arguments.device == "cuda":
        from scripts.gpu import stub_card

        stub_card.install()
        stub_card.choose_platform()
    with tempfile.TemporaryDirectory(prefix="kvserve-gpu-") as name:
        stage = Stage(Path(name), arguments)
        if not stage.rehearses:
            run(stage)
            return
        with stage.attempt("engines"):
            for label, spec in (engines(stage) if engines else {}).items():
                with stage.attempt(label):
                    stage.note(**{label: rehearse(spec)})
        if prepare is not None:
            with stage.attempt("prepare"):
                prepare(stage)
