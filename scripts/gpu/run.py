# SPDX-License-Identifier: Apache-2.0
"""kvserve's test and benchmark on a real GPU.

Each stage runs in a process of its own, within its own limit; it prints and saves one
line of JSON, and whatever it failed at is left in its log. Stages that fail take no
other with them.

    python scripts/gpu/run.py smoke identity needles attention
    python scripts/gpu/run.py all --bundle .gpu --out results --seconds 480
    python scripts/gpu/run.py smoke --device cpu

With a bundle (``make gpu-bundle``), a bare machine needs Python and PyTorch alone.
Without one, run it in an environment where ``make setup`` installed the CUDA build.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from scripts.gpu.parts import (  # noqa: E402
    MANIFEST,
    BundleError,
    Manifest,
    unpack,
)

STAGES: dict[str, int] = {
    "smoke": 90,
    "identity": 210,
    "needles": 120,
    "attention": 120,
    "step": 150,
    "serving": 420,
    "quantised": 90,
    "stress": 150,
    "moe": 90,
}
"""Stages in the order of what they are worth, with their limits in seconds."""

NEEDS: dict[str, tuple[str, ...]] = {
    "identity": ("model",),
    "needles": ("model",),
    "quantised": ("model",),
    "moe": ("moe",),
}
"""Archives beside those that every stage needs."""
ALWAYS = ("engine", "python")
LEAST_SECONDS = 20
"""A stage is not started with less time left."""
_TAIL = 1500


@dataclass(frozen=True)
class Place:
    """Where a run finds and leaves things.

    Attributes:
        bundle: the parts; ``None``: vLLM is installed.
        home: where they are unpacked, and where the model is converted.
        out: lines and logs.
    """

    bundle: Path | None
    home: Path
    out: Path

    @property
    def site(self) -> Path:
        return self.home / "site"


def environment(place: Place) -> dict[str, str]:
    """Variables that every stage runs under."""
    paths = [str(ROOT)]
    own = {
        "PYTHONUNBUFFERED": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "KVSERVE_EXPERIMENTAL_CUDA": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if place.bundle is not None:
        paths.append(str(place.site))
        own["KVSERVE_CACHE"] = str(place.home / "models")
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


def prepare(place: Place, stage: str) -> None:
    """Unpack what a stage needs, once.

    Raises:
        BundleError: a part is missing or torn.
    """
    if place.bundle is None:
        return
    manifest = Manifest.read(place.bundle)
    for archive in (*ALWAYS, *NEEDS.get(stage, ())):
        unpack(manifest, archive, place.bundle, place.site)


def run_stage(
    stage: str, options: list[str], place: Place, limit: float
) -> dict[str, Any]:
    """Run one stage in its own process; return its line.

    What the stage had found when it failed, or when its time was up, is in the line.
    """
    found = place.out / f"{stage}.found.json"
    log = place.out / f"{stage}.log"
    found.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        prepare(place, stage)
    except BundleError as error:
        return {"stage": stage, "ok": False, "seconds": 0.0, "error": str(error)}
    command = [sys.executable, "-m", f"scripts.gpu.stages.{stage}"]
    command += ["--found", str(found), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(place),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            error = None if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            error = f"was stopped after {limit:.0f} s"
        finally:
            _end_group(process)
    line: dict[str, Any] = {"stage": stage, "ok": error is None}
    line["seconds"] = round(time.monotonic() - start, 1)
    if found.is_file():
        line["found"] = json.loads(found.read_text(encoding="utf-8"))
        found.unlink()
    line["ok"] = line["ok"] and not line.get("found", {}).get("failures")
    if error:
        line["error"] = error
        line["tail"] = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    return line


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_line(line: dict[str, Any], out: Path) -> None:
    """Print a stage's line, and add it to the file of all lines."""
    text = json.dumps(line)
    print(text, flush=True)
    with (out / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def chosen_stages(asked: list[str]) -> list[str]:
    """Stages by name, in the order given; ``all`` is every one.

    Raises:
        BundleError: there is no such stage.
    """
    stages = [name for one in asked for name in (STAGES if one == "all" else [one])]
    if unknown := [name for name in stages if name not in STAGES]:
        known = ", ".join([*STAGES, "all"])
        raise BundleError(f"{unknown[0]}: is no stage; choose from {known}")
    return stages


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=[])
    parser.add_argument("--bundle", type=Path, help="folder with the bundle's parts")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("KVSERVE_GPU_HOME", "~/.cache/kvserve-gpu")),
        help="where the bundle is unpacked",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for all stages together"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="build every configuration and prompt, and run nothing",
    )
    parser.add_argument(
        "--unpack",
        nargs="*",
        metavar="ARCHIVE",
        default=[],
        help="unpack these archives first, and say so",
    )
    return parser


def unpack_archives(place: Place, archives: list[str]) -> None:
    """Unpack archives whose parts have arrived."""
    assert place.bundle is not None
    manifest = Manifest.read(place.bundle)
    for archive in archives:
        start = time.monotonic()
        unpack(manifest, archive, place.bundle, place.site)
        print(f"unpacked {archive} in {time.monotonic() - start:.1f} s", flush=True)


def check_card(place: Place) -> dict[str, Any]:
    """Ask the GPU who it is, in a process of its own.

    Raises:
        BundleError: there is none, or its driver or it is too old.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu.card"],
        cwd=ROOT,
        env=environment(place),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the GPU could not be asked"]
        raise BundleError(lines[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run the stages; the exit code says whether all are well."""
    args = make_parser().parse_args()
    bundle = args.bundle
    if bundle is None and (ROOT / ".gpu" / MANIFEST).is_file():
        bundle = ROOT / ".gpu" if args.device == "cuda" else None
    place = Place(bundle, args.home.expanduser().resolve(), args.out.resolve())
    place.out.mkdir(parents=True, exist_ok=True)
    try:
        stages = chosen_stages(args.stages)
        if args.unpack:
            if bundle is None:
                raise BundleError("--unpack: needs --bundle")
            unpack_archives(place, args.unpack)
        if stages and args.device == "cuda" and not args.rehearse:
            write_line({"stage": "card", "ok": True, **check_card(place)}, place.out)
    except BundleError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    options = ["--device", args.device, *(["--rehearse"] if args.rehearse else [])]
    end, well = time.monotonic() + args.seconds, True
    for stage in stages:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            line = {"stage": stage, "ok": False, "error": "no time was left"}
        else:
            line = run_stage(stage, options, place, min(STAGES[stage], left))
        write_line(line, place.out)
        well = well and bool(line["ok"])
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
