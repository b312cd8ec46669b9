# SPDX-License-Identifier: Apache-2.0
"""Which ways of guessing tokens a policy is served with."""

from __future__ import annotations

from importlib import util
from types import SimpleNamespace
from typing import Any

import pytest

from kvserve.engine.devices import hardware
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.speculation import check_method
from kvserve.errors import UserError

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def options(speculative: dict[str, Any], **others: Any) -> dict[str, Any]:
    given = {"speculative_config": speculative, **others}
    return engine_options(PolicySettings("full"), given)


@pytest.mark.parametrize(
    "given",
    [
        NGRAM,
        {**NGRAM, "method": "[ngram]"},
        {"model": "ngram", "num_speculative_tokens": 4},
        {"model": "[ngram]", "num_speculative_tokens": 4},
    ],
)
def test_n_grams_are_passed_on_as_they_are(given: dict[str, Any]) -> None:
    assert options(given)["speculative_config"] == given


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "eagle", "model": "a/b"}, "method eagle"),
        ({"method": "ngram_gpu"}, "method ngram_gpu"),
        ({"method": "draft_model", "model": "a/b"}, "method draft_model"),
        ({"model": "a/b"}, "a model"),
    ],
)
def test_models_that_guess_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"^--speculative-config: .* from {named};"):
        options({"num_speculative_tokens": 4, **given})


def test_suffixes_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = {"method": "suffix"}
    module = "kvserve.engine.start.speculation.find_spec"
    monkeypatch.setattr(module, lambda _: None)
    with pytest.raises(UserError, match="needs the package arctic-inference"):
        options(suffix)
    monkeypatch.setattr(module, lambda _: util.find_spec("json"))
    assert options(suffix)["speculative_config"] == suffix


def test_a_gpu_has_not_been_seen_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    with pytest.raises(UserError, match=r"^--speculative-config: .* on CPUs only"):
        options(NGRAM)


def test_processors_of_logits_are_asked_about_one_token() -> None:
    with pytest.raises(UserError, match=r"^--speculative-config: .*logits-processors"):
        options(NGRAM, logits_processors=["some.Processor"])


def test_states_cannot_go_back_to_before_a_refused_token() -> None:
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(method="ngram"),
        model_config=SimpleNamespace(model="a/b", is_hybrid=True),
    )
    with pytest.raises(UserError, match=r"^--speculative-config: MODEL a/b keeps"):
        check_method(config)
    config.model_config.is_hybrid = False
    check_method(config)
    config.speculative_config.method = "eagle"
    with pytest.raises(UserError, match="from method eagle"):
        check_method(config)
