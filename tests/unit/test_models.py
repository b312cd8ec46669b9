# SPDX-License-Identifier: Apache-2.0
"""Where models are found, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from kvserve.errors import UserError
from kvserve.models import EMBEDDED_MODEL, embedded_model, resolve_model


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
        "temperature": 0.0,
    }
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "generation_config.json",
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that may not be asked."""

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("looked up a model that is here")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_what_is_on_this_machine_is_not_looked_up(hub: Path) -> None:
    (hub / "models--some--model" / "snapshots").mkdir(parents=True)
    for name in (str(hub), "some/model", "s3://bucket/model"):
        assert resolve_model(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "some/model",
            "MODEL some/model: no such directory, and not in .*; HF_HUB_",
        ),
        ("/some/model", "MODEL /some/model: no such directory$"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_model_that_is_not_here_is_refused_offline(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve_model(name)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("no route\nto host"), r"cannot be asked \(no route\); give"),
        (RepositoryNotFoundError, "shows none of that name"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_asked_in_vain_gives_one_line(
    error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object, **__: object) -> None:
        raise error if isinstance(error, OSError) else error.__new__(error)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(UserError, match=says) as caught:
        resolve_model("some/model")
    assert "\n" not in str(caught.value)
