# SPDX-License-Identifier: Apache-2.0
"""Replies that a schema or an expression constrains, under every family of policies."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import EngineSlot

pytestmark = pytest.mark.engine

POLICIES: dict[str, dict[str, Any]] = {
    "retrieval": {},
    "kvzap": {"budget": "50%"},
    "h2o": {"budget": "50%"},
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "port": {"enum": ["Lyme", "Plymouth"]},
        "ships": {"type": "integer"},
    },
    "required": ["port", "ships"],
    "additionalProperties": False,
}
_NUMBER = "[1-9][0-9]{3}-[0-9]{4}"


@pytest.mark.parametrize("policy", POLICIES)
def test_replies_keep_to_what_is_asked_beside_free_ones(
    engines: EngineSlot, models: dict[str, Model], policy: str
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    arguments = POLICIES[policy]
    engine = engines.start(models["smollm2"].path, policy, arguments)
    tokenizer = engine._llm.get_tokenizer()
    text = "The ships came to the port. " * 60
    prompt = tokenizer.encode(text + "\nWhich port, and how many ships?\n")
    asked = [
        StructuredOutputsParams(json=_SCHEMA),
        StructuredOutputsParams(regex=_NUMBER),
        None,
    ]
    names = [
        engine.add(prompt, 60, ignore_eos=False, structured_outputs=one)
        for one in asked
    ]
    engine.finish()
    said = [
        tokenizer.decode(engine.replies.pop(name).tokens, skip_special_tokens=True)
        for name in names
    ]
    assert set(json.loads(said[0])) == {"port", "ships"}
    assert re.fullmatch(_NUMBER, said[1])
    assert said[2] not in ("", *said[:2])
    assert engine.pages_held == {}
