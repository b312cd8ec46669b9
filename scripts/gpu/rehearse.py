# SPDX-License-Identifier: Apache-2.0
"""Prove the bundle without a GPU: ``make gpu-rehearsal``.

Makes an environment like the bare machine's (Python 3.12, its PyTorch, of its packages
those that our lock names), unpacks the bundle, and with a stand-in for the driver
imports everything, compiles our kernels for the card, and rehearses every stage.

    python scripts/gpu/rehearse.py [--bundle .gpu] [--venv .venv-gpu-rehearsal]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from scripts.gpu import stub_card  # noqa: E402
from scripts.gpu.bundle import (  # noqa: E402
    HERE,
    LOCK,
    locked_versions,
    names_in,
    normal,
)
from scripts.gpu.parts import BundleError, Manifest, unpack  # noqa: E402
from scripts.gpu.run import Place, environment  # noqa: E402

COMPILES = "tests/unit/kernels/test_triton_compiles.py"
_CUDA = re.compile(r"^(nvidia-|cuda-|torch|triton|cupy|jax)")


def bare_packages() -> list[str]:
    """What the bare machine has of our lock, at its versions where they are known."""
    locked, found = locked_versions(LOCK.read_text()), []
    for line in names_in(HERE / "bare_machine.txt"):
        name, _, version = line.partition("==")
        if normal(name) in locked and not _CUDA.match(normal(name)):
            found.append(f"{name}=={version or locked[normal(name)]}")
    return found


def bare_torch() -> str:
    """The bare machine's PyTorch."""
    lines = names_in(HERE / "bare_machine.txt")
    return next(line for line in lines if line.startswith("torch=="))


def make_environment(python312: str, uv: str, venv: Path) -> Path:
    """Make the environment, unless it is there; return its interpreter."""
    python = venv / "bin" / "python"
    done = venv / ".installed"
    mark = "\n".join([bare_torch(), *bare_packages()])
    if done.is_file() and done.read_text() == mark:
        return python
    subprocess.run([python312, "-m", "venv", "--clear", str(venv)], check=True)
    install = [uv, "pip", "install", "-q", "-p", str(python)]
    subprocess.run([*install, bare_torch()], check=True)
    subprocess.run([*install, "--no-deps", *bare_packages()], check=True)
    done.write_text(mark)
    return python


def rehearse(python: Path, place: Place) -> list[str]:
    """Import, compile, and rehearse; return which of them failed."""
    assert place.bundle is not None
    manifest = Manifest.read(place.bundle)
    for archive in manifest.archives:
        unpack(manifest, archive.name, place.bundle, place.site)
    driver = stub_card.build_driver(list(place.site.rglob("*.so")), place.home / "stub")
    variables = environment(place)
    paths = [str(driver.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    failed = []
    run = [str(HERE / "run.py"), "all", "--rehearse", "--bundle", str(place.bundle)]
    run += ["--home", str(place.home), "--out", str(place.out)]
    for name, command in {
        "imports": ["-m", "scripts.gpu.imports"],
        "kernels": ["-m", "pytest", "-q", "-p", "no:cacheprovider", COMPILES],
        "stages": run,
    }.items():
        print(f"== {' '.join(command)}", flush=True)
        done = subprocess.run([str(python), *command], cwd=ROOT, env=variables)
        failed += [name] if done.returncode else []
    return failed


def main() -> int:
    """Rehearse, and say whether the bundle is whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-gpu-rehearsal")
    parser.add_argument("--python312", default="python3.12")
    parser.add_argument("--uv", default="uv")
    args = parser.parse_args()
    venv = args.venv.resolve()
    place = Place(args.bundle.resolve(), venv / "home", venv / "results")
    try:
        python = make_environment(args.python312, args.uv, venv)
        failed = rehearse(python, place)
    except (BundleError, subprocess.CalledProcessError, OSError) as error:
        print(f"gpu-rehearsal: {error}", file=sys.stderr)
        return 1
    print(f"failed: {', '.join(failed)}" if failed else "the bundle is whole")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
