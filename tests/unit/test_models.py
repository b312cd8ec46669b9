# SPDX-License-Identifier: Apache-2.0
"""The embedded model's directory says how to sample from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvserve.models import EMBEDDED_MODEL, embedded_model


@pytest.mark.parametrize("left", [None, '{"bos_token_id": 1}'])
def test_a_model_that_an_older_version_converted_learns_how_to_sample(
    left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVE_CACHE", str(tmp_path))
    model = tmp_path / EMBEDDED_MODEL
    model.mkdir()
    (model / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    generation = model / "generation_config.json"
    if left is not None:
        generation.write_text(left)
    assert embedded_model() == model
    assert json.loads(generation.read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "generation_config.json",
    }
