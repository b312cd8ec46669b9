# SPDX-License-Identifier: Apache-2.0
"""The bundle for a bare GPU machine, and the runner of stages."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import bundle, card, run, stages
from scripts.gpu.parts import BundleError, Manifest, cut, unpack
from scripts.gpu.stages.common import read_junit

LIMIT = 700


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A bundle of two archives, the second of which lies in several parts."""
    import random

    source = random.Random(0)
    archives = []
    for name, size in (("first", 400), ("second", 3000)):
        tree = tmp_path / name
        tree.mkdir()
        (tree / f"{name}.bin").write_bytes(source.randbytes(size))
        archives.append(bundle.pack(tree, tmp_path / f"{name}.tar.xz"))
    out = tmp_path / "parts"
    out.mkdir()
    cut(archives, out, LIMIT)
    return out


def test_what_is_packed_is_unpacked_from_parts_of_the_asked_size(
    packed: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(packed)
    assert len(manifest.parts) > 4
    assert all(part.size == LIMIT for part in manifest.parts[:-1])
    for name in ("second", "first"):
        unpack(manifest, name, packed, tmp_path / "site")
        found = tmp_path / "site" / f"{name}.bin"
        assert found.read_bytes() == (tmp_path / name / f"{name}.bin").read_bytes()


def test_an_archive_needs_its_own_parts_alone_and_unpacks_once(
    packed: Path, tmp_path: Path
) -> None:
    manifest, site = Manifest.read(packed), tmp_path / "site"
    own = {part.name for part, _ in manifest.parts_of("first")}
    for part in manifest.parts:
        if part.name not in own:
            (packed / part.name).unlink()
    unpack(manifest, "first", packed, site)
    (site / "first.bin").write_text("touched")
    for name in own:
        (packed / name).unlink()
    unpack(manifest, "first", packed, site)
    assert (site / "first.bin").read_text() == "touched"


@pytest.mark.parametrize("harm", ["missing", "short", "changed"])
def test_a_part_that_is_missing_or_torn_is_named_with_the_way_out(
    packed: Path, tmp_path: Path, harm: str
) -> None:
    manifest = Manifest.read(packed)
    part = packed / manifest.parts_of("second")[-1][0].name
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if harm == "short":
        part.write_bytes(whole[:-1])
    if harm == "missing":
        part.unlink()
    with pytest.raises(BundleError, match=part.name) as refusal:
        unpack(manifest, "second", packed, tmp_path / "site")
    assert "make gpu-bundle" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "site" / "second.bin").exists()


@pytest.mark.parametrize("text", [None, "{", '{"parts": [{}], "archives": []}'])
def test_a_manifest_that_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json.*make gpu-bundle"):
        Manifest.read(tmp_path)


def test_packages_are_pinned_by_the_lock() -> None:
    versions = bundle.locked_versions("a_b[extra]==1.0\n# c==2\nd.e==3!4.1\n")
    assert bundle.requirements(["A-B", "d-e"], versions) == ["a-b==1.0", "d-e==3!4.1"]
    with pytest.raises(BundleError, match="no f"):
        bundle.requirements(["f"], versions)


def test_the_lock_has_every_package_that_the_bundle_names() -> None:
    versions = bundle.locked_versions(bundle.LOCK.read_text())
    names = bundle.names_in(bundle.HERE / "packages.txt")
    assert len(bundle.requirements([*names, bundle.VLLM, bundle.MODEL], versions)) > 30


def test_entry_points_travel_with_the_bundle(tmp_path: Path) -> None:
    from importlib.metadata import distributions

    bundle.write_metadata(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    groups = {point.group for point in found.entry_points}
    assert {"vllm.general_plugins", "kvserve.policies"} <= groups


GOOD = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--found", type=pathlib.Path)
parser.add_argument("--device")
args = parser.parse_args()
args.found.write_text(json.dumps({"speed": 3, **EXTRA}))
print("hello")
"""
FAKES = {
    "good": GOOD.replace("EXTRA", "{}"),
    "wrong": GOOD.replace("EXTRA", '{"failures": ["it differs"]}'),
    "broken": "raise RuntimeError('no such kernel')\n",
    "slow": GOOD.replace("EXTRA", "{}")
    + "import subprocess, sys, time\n"
    + "child = 'import time, pathlib; time.sleep(3); pathlib.Path(%r).touch()'\n"
    + "left = str(args.found.with_name('left-behind'))\n"
    + "subprocess.Popen([sys.executable, '-c', child % left])\n"
    + "time.sleep(60)\n",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stages of the test's own, and the folder of what they find."""
    folder = tmp_path / "scripts" / "gpu" / "stages"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    for name, text in FAKES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    limits = {"good": 30, "wrong": 30, "broken": 30, "slow": 2}
    monkeypatch.setattr(run, "STAGES", limits)
    return tmp_path / "out"


def lines_of(out: Path) -> dict[str, dict[str, Any]]:
    text = (out / "lines.jsonl").read_text()
    return {line["stage"]: line for line in map(json.loads, text.splitlines())}


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", *arguments])
    return run.main()


def test_stages_that_fail_take_no_other_with_them(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["broken", "slow", "wrong", "good"]
    assert main(monkeypatch, *stages, "--out", str(fakes)) == 1
    lines = lines_of(fakes)
    assert list(lines) == stages
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in printed] == list(lines.values())
    assert lines["good"]["ok"]
    assert lines["good"]["found"] == {"speed": 3}
    assert not any(lines[name]["ok"] for name in stages[:3])
    assert "no such kernel" in lines["broken"]["tail"]
    assert lines["wrong"]["found"]["failures"] == ["it differs"]
    assert (fakes / "good.log").read_text() == "hello\n"


def test_a_stage_is_stopped_at_its_limit_with_what_it_started_and_keeps_what_it_found(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    assert main(monkeypatch, "slow", "--out", str(fakes)) == 1
    assert time.monotonic() - start < 10
    line = lines_of(fakes)["slow"]
    assert line["error"] == "was stopped after 2 s"
    assert line["found"] == {"speed": 3}
    time.sleep(2.5)
    assert not (fakes / "left-behind").exists()


def test_no_stage_starts_when_the_time_of_all_is_up(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(monkeypatch, "good", "--seconds", "1", "--out", str(fakes)) == 1
    assert lines_of(fakes)["good"]["error"] == "no time was left"


def test_an_unknown_stage_is_one_line(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "nothing", "--out", str(fakes)) == 2
    assert "choose from good" in capsys.readouterr().err


def test_a_stage_whose_part_is_missing_says_so_and_the_next_runs(
    fakes: Path,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "ALWAYS", ("first",))
    monkeypatch.setattr(run, "NEEDS", {"wrong": ("second",)})
    last = Manifest.read(packed).parts[-1]
    (packed / last.name).unlink()
    where = ["--bundle", str(packed), "--home", str(tmp_path / "home")]
    assert main(monkeypatch, "wrong", "good", *where, "--out", str(fakes)) == 1
    lines = lines_of(fakes)
    assert last.name in lines["wrong"]["error"]
    assert lines["good"]["ok"]


def test_every_stage_has_a_module_and_a_limit() -> None:
    folder = Path(stages.__path__[0])
    modules = {path.stem for path in folder.glob("*.py")}
    shared = {"__init__", "common", "shapes", "cases"}
    assert modules - shared == set(run.STAGES)
    assert set(run.NEEDS) <= set(run.STAGES)


@pytest.mark.parametrize(
    ("capability", "free", "word"),
    [((7, 5), 16 << 30, "compute capability 7.5"), ((9, 0), 1 << 30, "1024 MiB free")],
)
def test_a_card_that_will_not_do_is_refused_in_one_line(
    capability: tuple[int, int], free: int, word: str
) -> None:
    why = card.refusal(capability, free, "Some card", "500.1")
    assert why is not None
    assert word in why
    assert "\n" not in why
    assert card.refusal((9, 0), 80 << 30, "Some card", "500.1") is None


def test_a_machine_without_a_gpu_is_refused_in_one_line(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(run, "ROOT", bundle.ROOT)
    monkeypatch.setattr(sys, "argv", ["run.py", "good", "--out", str(fakes)])
    assert run.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu: no usable NVIDIA GPU")
    assert said.count("\n") == 1


def test_a_report_of_tests_is_counted() -> None:
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase>"
    found = read_junit(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert found == {"passed": 1, "skipped": 0, "failed": ["b"]}


def test_byte_code_and_tests_do_not_travel(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "package" / "tests").mkdir(parents=True)
    (tree / "package" / "module.py").touch()
    (tree / "package" / "module.pyc").touch()
    (tree / "package" / "tests" / "test_it.py").touch()
    with tarfile.open(bundle.pack(tree, tmp_path / "tree.tar.xz")) as tar:
        assert tar.getnames() == ["package", "package/module.py"]
