# SPDX-License-Identifier: Apache-2.0
"""The official OpenAI client against `kvserve serve`, as users write it."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest

from tests.http.harness import MODEL, Server

pytestmark = pytest.mark.engine

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", name="ai")
def _ai(server: Server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.base}/v1", api_key=server.key, timeout=120, max_retries=0
    )


def test_the_embedded_model_is_listed_by_its_name(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list().data] == [MODEL]


def test_chat_answers_with_usage_and_logprobs(ai: openai.OpenAI) -> None:
    reply = ai.chat.completions.create(
        model=MODEL,
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


def test_streaming_gives_the_text_of_the_whole_reply(
    ai: openai.OpenAI,
) -> None:
    prompt = "Once upon a time, in a small village by the sea,"
    whole = ai.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=24
    )
    chunks = ai.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text


def test_structured_output_obeys_its_schema(ai: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    reply = ai.chat.completions.create(
        model=MODEL,
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
    ai: openai.OpenAI,
) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    reply = ai.chat.completions.create(
        model=MODEL,
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


def test_a_request_longer_than_the_model_gets_400(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ai.completions.create(model=MODEL, prompt="a b " * 2000, max_tokens=4)


def test_a_stream_ends_with_usage_when_asked(ai: openai.OpenAI) -> None:
    chunks = list(
        ai.chat.completions.create(
            model=MODEL,
            messages=_QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks[-1].usage
    assert usage is not None
    assert chunks[-1].choices == []
    assert 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stop_string_ends_the_reply_before_it(ai: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "1 2 3 4 5 6", "temperature": 0}
    whole = ai.completions.create(**options, max_tokens=24)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:2]
    reply = ai.completions.create(**options, max_tokens=24, stop=[stop])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == text[: text.index(stop)]


def test_n_gives_that_many_choices(ai: openai.OpenAI) -> None:
    reply = ai.chat.completions.create(
        model=MODEL,
        messages=_QUESTION,  # type: ignore[arg-type]
        n=3,
        temperature=1.5,
        seed=1,
        max_tokens=12,
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1


def test_several_replies_of_a_greedy_model_are_refused_with_the_way_out(
    ai: openai.OpenAI,
) -> None:
    chat, text = ai.chat.completions.create, ai.completions.create
    question: Any = _QUESTION
    for ask in (
        lambda: chat(model=MODEL, messages=question, n=2),
        lambda: text(model=MODEL, prompt="Once", n=2),
    ):
        with pytest.raises(openai.BadRequestError, match="set temperature above 0"):
            ask()


def test_a_seed_makes_samples_repeatable(ai: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        reply = ai.completions.create(
            model=MODEL, prompt="Once", temperature=1.5, seed=seed, max_tokens=16
        )
        return reply.choices[0].text

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first


def test_errors_are_those_that_the_client_knows(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        ai.completions.create(model="no-such-model", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert "temperature" in str(caught.value)
    stranger = ai.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as too_long:
        ai.completions.create(model=MODEL, prompt="a" * (2 << 20))
    assert too_long.value.status_code == 413


def test_usage_shows_pages_while_a_request_runs_and_none_after(
    server: Server, ai: openai.OpenAI
) -> None:
    stream = ai.completions.create(
        model=MODEL,
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
        ai.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert _usage(server) == 0


def _usage(server: Server) -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    (line,) = [x for x in lines if x.startswith("vllm:kv_cache_usage_perc")]
    return float(line.rsplit(" ", 1)[1])
