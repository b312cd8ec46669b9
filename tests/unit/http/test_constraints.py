# SPDX-License-Identifier: Apache-2.0
"""Structured outputs are compiled before the engine has them, and refused by field."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.v1.structured_output
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from kvserve.http.constraints import ConstraintGuard, guard_constraints
from tests.unit.byte_tokenizer import byte_tokenizer


def _config(backend: str = "auto") -> Any:
    model = SimpleNamespace(
        max_model_len=128,
        is_diffusion=False,
        skip_tokenizer_init=False,
        hf_config=SimpleNamespace(model_type="llama"),
        get_vocab_size=lambda: 257,
    )
    return SimpleNamespace(
        structured_outputs_config=StructuredOutputsConfig(backend=backend),  # type: ignore[arg-type]
        model_config=model,
        parallel_config=SimpleNamespace(distributed_executor_backend="uni"),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        speculative_config=None,
    )


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm.v1.structured_output,
        "cached_tokenizer_from_config",
        lambda **_: byte_tokenizer(),
    )


def _check(guard: ConstraintGuard, field: str = "response_format", **said: Any) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**said))
    asyncio.run(guard.check(params, field))


_ITSELF = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"grammar": 'root ::= "a"\nroot ::= "b"'}, 'Rule "root" is defined multiple'),
        ({"grammar": "root ::= root"}, "permits no reply at all"),
        ({"json": {"$ref": "#"}}, "permits no reply at all"),
        ({"json": _ITSELF}, "permits no reply at all"),
        ({"json": {"type": "nonsense"}}, 'Unsupported type "nonsense"'),
        ({"json": "[1]"}, "The schema should be a string"),
        (
            {"json": {"type": "array", "uniqueItems": True}},
            "backend guidance, or leave",
        ),
        ({"regex": "("}, "parenthesis is not closed"),
        ({"choice": []}, "cannot be an empty list"),
        ({"structural_tag": '{"type": "structural_tag"}'}, "must have a format field"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_field_and_reason(
    said: dict[str, Any], why: str
) -> None:
    with pytest.raises(VLLMValidationError) as refusal:
        _check(ConstraintGuard(_config()), **said)
    message = str(refusal.value)
    assert refusal.value.parameter == "response_format"
    assert message.startswith("response_format: ")
    assert why in message
    assert "\n" not in message
    assert ".cc:" not in message


@pytest.mark.parametrize(
    "said",
    [
        {"grammar": 'root ::= "a" | "b"'},
        {"grammar": 'root ::= "a" root | ""'},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
        {"json": json.dumps({"type": "string"})},
        {"json_object": True},
        {"regex": "[a-z]+"},
        {"choice": ["yes", "no"]},
    ],
)
@pytest.mark.parametrize("backend", ["auto", "guidance"])
def test_what_can_be_honoured_passes(backend: str, said: dict[str, Any]) -> None:
    _check(ConstraintGuard(_config(backend)), **said)


def test_the_first_request_does_not_choose_for_all() -> None:
    config = _config()
    ConstraintGuard(config)
    assert config.structured_outputs_config.backend == "xgrammar"
    config = _config("guidance")
    ConstraintGuard(config)
    assert config.structured_outputs_config.backend == "guidance"


def test_what_takes_for_ever_is_refused_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = ConstraintGuard(_config(), patience=0.2)
    monkeypatch.setattr(guard, "_try", lambda _: time.sleep(1))

    async def ask() -> list[Any]:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        start = time.monotonic()
        asked = [guard.check(params, "tools") for _ in range(3)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - start < 0.8
        await asyncio.sleep(1)
        monkeypatch.setattr(guard, "_try", lambda _: None)
        await guard.check(params, "tools")
        return found

    slow, slow_too, waiting = asyncio.run(ask())
    for refusal in (slow, slow_too):
        assert isinstance(refusal, VLLMValidationError)
        assert "takes longer than 0.2 s to compile" in str(refusal)
    assert isinstance(waiting, GracefulHTTPError)
    assert waiting.http_status == 503


class _Renderer:
    async def render_chat(self, request: Any) -> str:
        if request.tools:
            request.structured_outputs = StructuredOutputsParams(json={"$ref": "#"})
        return "rendered"


def _request(**said: Any) -> Any:
    request = SimpleNamespace(
        use_beam_search=False,
        structured_outputs=None,
        response_format=None,
        tools=None,
        **said,
    )
    request.to_sampling_params = lambda *_: SamplingParams(
        structured_outputs=request.structured_outputs
    )
    return request


def test_tools_are_checked_once_they_have_been_made_into_a_constraint() -> None:
    renderer: Any = _Renderer()
    state: Any = SimpleNamespace(online_renderer=renderer)
    client = SimpleNamespace(generate=lambda *_: None)
    guard_constraints(client, state, ConstraintGuard(_config()))
    assert asyncio.run(renderer.render_chat(_request())) == "rendered"
    asking = _request()
    asking.tools = [{}]
    with pytest.raises(VLLMValidationError, match=r"^tools: permits no reply"):
        asyncio.run(renderer.render_chat(asking))


def test_a_dead_end_on_the_way_is_the_clients_fault_and_only_then() -> None:
    async def generate(*_: Any) -> AsyncGenerator[Any, None]:
        for reason in (None, "error"):
            yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])

    client: Any = SimpleNamespace(generate=generate)
    guard_constraints(client, SimpleNamespace(), ConstraintGuard(_config()))  # type: ignore[arg-type]

    async def ask(params: SamplingParams) -> int:
        return len([output async for output in client.generate("", params)])

    # Without a constraint it is the server's, and vLLM says so.
    assert asyncio.run(ask(SamplingParams())) == 2
    constrained = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(VLLMValidationError, match="from which no reply goes on"):
        asyncio.run(ask(constrained))
