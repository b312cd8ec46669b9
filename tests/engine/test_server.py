# SPDX-License-Identifier: Apache-2.0
"""The server as a user meets it: `kvserve serve` and the official OpenAI client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import openai
import pytest

from tests.engine.servers import metric, running_server

pytestmark = pytest.mark.engine

_MODEL = "SmolLM2-135M-Instruct"
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = [
        *("--dtype", "float32", "--kv-cache-memory-bytes", "256M"),
        *("--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    with running_server(flags, tmp_path_factory.mktemp("server") / "log") as base:
        yield base


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


def test_the_embedded_model_is_listed_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [_MODEL]


def test_chat_answers_with_usage_and_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=_MODEL,
        messages=_QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=16,
        logprobs=True,
        top_logprobs=3,
    )
    choice = reply.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 3
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(choice.logprobs.content)


def test_streaming_gives_the_text_of_the_whole_reply(client: openai.OpenAI) -> None:
    prompt = "Once upon a time, in a small village by the sea,"
    whole = client.completions.create(
        model=_MODEL, prompt=prompt, temperature=0, max_tokens=24
    )
    chunks = client.completions.create(
        model=_MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text


def test_structured_output_obeys_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=_MODEL,
        messages=[{"role": "user", "content": "Describe Ann, aged 30, as JSON."}],
        temperature=0,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema},
        },
    )
    person = json.loads(reply.choices[0].message.content or "")
    assert set(person) == {"name", "age"}


def test_a_named_tool_is_called(
    client: openai.OpenAI,
) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=_MODEL,
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        temperature=0,
        max_tokens=64,
        tools=[
            {
                "type": "function",
                "function": {"name": "weather", "parameters": parameters},
            }
        ],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    calls = reply.choices[0].message.tool_calls
    assert calls is not None
    # Stock vLLM gives this model's arguments as they come: only the name counts.
    assert calls[0].function.name == "weather"  # type: ignore[union-attr]


def test_a_request_longer_than_the_model_gets_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=_MODEL, prompt="a b " * 2000, max_tokens=4)


def test_usage_shows_pages_while_a_request_runs_and_none_after(
    server: str, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model=_MODEL,
        prompt="tell me more " * 200,
        temperature=0,
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    busy = max(_usage(server) for _ in zip(stream, range(60), strict=False))
    stream.close()
    assert busy > 0
    deadline = time.monotonic() + 30
    while _usage(server) > 0 and time.monotonic() < deadline:
        client.completions.create(model=_MODEL, prompt="a", max_tokens=1)
    assert _usage(server) == 0


def _usage(server: str) -> float:
    (usage,) = metric(server, "vllm:kv_cache_usage_perc").values()
    return usage
