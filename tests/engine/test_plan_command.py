# SPDX-License-Identifier: Apache-2.0
"""``kvserve plan`` says what a cache holds, and what it cannot help."""

from __future__ import annotations

import pytest

from kvserve.cli import main
from kvserve.units import format_bytes
from tests.engine.conftest import Model
from tests.engine.harness import PAGE

pytestmark = pytest.mark.engine


def test_without_a_profile_the_default_policy_is_full_and_says_so(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(models["tiny-gqa"].path), "--kv-memory", "64M"]) == 0
    shown = capsys.readouterr().err
    assert "no profile ships" in shown
    assert "keep everything" in shown


def test_plan_knows_what_pages_hold_and_what_requests_may_name(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "sink-recent"]
    argv += ["--dtype", "float32", "--kv-memory", "64M"]
    said = []
    for own in ([], ["--kv-cache-dtype", "int8_per_token_head"]):
        assert main([*argv, *own]) == 0
        said.append(capsys.readouterr().out)
    width = models["tiny-gqa"].shape.head_size
    for shown, token in zip(said, (2 * width * 4, 2 * width + 8), strict=True):
        assert f"of {format_bytes(PAGE * token)} pages" in shown
    assert main([*argv, "--allow-request-policies"]) == 0
    assert "name a policy of its own" in capsys.readouterr().err


def test_plan_lays_policies_side_by_side(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--kv-memory", "64M"]
    argv += ["--max-model-len", "1024", "--policy", "h2o:budget=25%,norm=count"]
    argv += ["--policy", "sink-recent:budget=512"]
    assert main(argv) == 0
    header, *_, last = capsys.readouterr().out.strip().splitlines()[2:]
    assert header.split()[-2:] == [
        "h2o:budget=25%,norm=count",
        "sink-recent:budget=512",
    ]
    assert [word for word in last.split() if "%" in word] == ["25.0%", "50.0%"]
    assert main([*argv, "--policy-arg", "norm=none"]) == 2
    assert "--policy-arg norm=none: of which policy?" in capsys.readouterr().err


def test_plan_tells_both_ends_of_a_range(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--kv-memory", "64M"]
    argv += ["--max-model-len", "1024", "--policy", "sink-recent:budget=50%..25%"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines() if "%" in line]
    least, largest = rows[-2:]
    assert least[:2] == ["1024", "25%"]
    assert largest[:2] == ["1024", "50%"]
    assert "25.0%" in least
    assert "50.0%" in largest
    # Requests that fit, of the pool that a full cache would have, and the gain.
    assert int(least[-3]) > int(largest[-3]) > int(largest[-2])
    assert "a request gets the largest budget with which all that wait" in shown.err
    assert main([*argv, "--policy", "full"]) == 0
    header = capsys.readouterr().out.splitlines()[2]
    assert header.split()[-3:] == [
        "sink-recent:budget=25%",
        "sink-recent:budget=50%",
        "full",
    ]


def test_plan_says_what_uneven_ranks_cost(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--policy", "retrieval", "--policy-arg", "full_ratio=0.1"]
    argv += ["--kv-memory", "512M", "--tensor-parallel-size", "3"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "on each of 3 ranks" in shown.out
    # Of nine full heads one rank has five, and its share would be three.
    assert "of 3 ranks the one that holds most decides: 1.40 times" in shown.err


def test_plan_says_when_compression_cannot_help(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "sink-recent"]
    assert main([*argv, "--kv-memory", "8G", "--max-num-seqs", "2"]) == 0
    assert "cannot raise throughput" in capsys.readouterr().out
