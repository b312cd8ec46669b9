# SPDX-License-Identifier: Apache-2.0
"""The type to serve in follows the processor, and whoever asked."""

from __future__ import annotations

import platform

import pytest
import torch

from kvserve import processor


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 processor that knows AVX2 at most."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("asked", [None, "auto"])
def test_an_old_processor_serves_in_float32_and_says_so(
    asked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert processor.settle_dtype(asked) == processor.default_dtype() == "float32"
    assert "--dtype bfloat16 insists" in capsys.readouterr().err


@pytest.mark.usefixtures("old")
def test_who_insists_gets_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert processor.settle_dtype("bfloat16") == "bfloat16"
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize(
    ("machine", "capability"), [("x86_64", "AVX512"), ("aarch64", "DEFAULT")]
)
def test_others_serve_in_the_type_of_the_model(
    machine: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor.settle_dtype(None) == "auto"
    assert processor.default_dtype() == "bfloat16"
