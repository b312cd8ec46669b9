# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a chat are its system prompt's, whatever its template is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from kvserve.engine.start.admission import PolicyGuard
from kvserve.http.request_policies import guard_requests
from kvserve.system_prompts import common_start
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.served_rules import RULE

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}[system]Be kind.\n{% endif %}" + TURNS
)
TOOLS = "{% for tool in tools or [] %}[tool]{{ tool }}\n{% endfor %}" + TURNS
SYSTEM = {"role": "system", "content": "Say a."}
MORE = {"role": "developer", "content": "Say b."}
USER = {"role": "user", "content": "Hello"}
REPLY = {"role": "assistant", "content": "a"}


@dataclass
class Renderer:
    """What vLLM's does, without vLLM's; counts what it was asked."""

    template: str
    asked: list[Any] = field(default_factory=list)
    clock: str = ""

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.tokenizer.chat_template = self.template

    async def preprocess_chat(
        self,
        request: Any,
        messages: list[Any],
        *,
        tool_dicts: Any = None,
        parser: Any = "parser",
    ) -> Any:
        self.asked.append((messages, parser))
        if parser:
            request.skip_special_tokens = False
        text = self.clock + self.tokenizer.apply_chat_template(
            messages, tools=tool_dicts, add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return messages, [{"type": "token", "prompt_token_ids": ids}]


def guarded(renderer: Renderer, protect: str = "requests") -> Renderer:
    client = SimpleNamespace(model_config=None, generate=None)
    state: Any = SimpleNamespace(online_renderer=renderer)
    guard_requests(client, state, PolicyGuard(RULE, 2048, 999), protect)
    return renderer


def protected(
    renderer: Any, *messages: Any, said: Any = "system", **other: Any
) -> tuple[Any, str]:
    """What a chat ends up asking for, and the text of the tokens that it names."""
    extra = {} if said is None else {"vllm_xargs": {"kv_protect": said, "mine": 1}}
    request = ChatCompletionRequest(messages=[*messages], **extra)
    rendered = renderer.preprocess_chat(request, request.messages, **other)
    _, (prompt,) = asyncio.run(rendered)
    found = (request.vllm_xargs or {}).get("kv_protect")
    if said is not None:
        assert request.vllm_xargs is not None
        assert request.vllm_xargs["mine"] == 1
    if not isinstance(found, str) or not found.startswith("0-"):
        return found, ""
    ids = prompt["prompt_token_ids"][: int(found[2:])]
    return found, renderer.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (TURNS, [SYSTEM, USER], "[system]Say a.\n[user]"),
        (TURNS, [SYSTEM, USER, REPLY, USER], "[system]Say a.\n[user]"),
        (TURNS, [SYSTEM, MORE, USER], "[system]Say a.\n[developer]Say b.\n[user]"),
        # What is no leading message is a turn like others.
        (TURNS, [USER, SYSTEM, USER], "[user]"),
        (TURNS, [SYSTEM], "[system]Say a.\n["),
        (DEFAULT, [USER], "[system]Be kind.\n[user]"),
        (DEFAULT, [SYSTEM, USER], "[system]Say a.\n[user]"),
    ],
)
def test_all_ahead_of_the_first_turn_is_protected(
    template: str, messages: list[Any], text: str
) -> None:
    renderer = guarded(Renderer(template))
    found = protected(renderer, *messages)
    assert found == (f"0-{len(text)}", text)
    assert protected(renderer, *messages) == found


def test_tools_are_part_of_it() -> None:
    renderer = guarded(Renderer(TOOLS))
    for name in ("one", "other"):
        _, text = protected(renderer, SYSTEM, USER, tool_dicts=[{"name": name}])
        assert text == f"[tool]{{'name': '{name}'}}\n[system]Say a.\n[user]"


def test_users_who_begin_alike_protect_nothing_of_it() -> None:
    renderer = guarded(Renderer(TURNS))
    for content in ("A", "0", "AAAA", "", "A0"):
        _, text = protected(renderer, SYSTEM, {"role": "user", "content": content})
        assert text == "[system]Say a.\n[user]"


def test_parts_of_a_message_may_be_read_once() -> None:
    class Joined(Renderer):
        async def preprocess_chat(self, request: Any, messages: Any, **_: Any) -> Any:
            flat = [
                {**m, "content": "".join(part["text"] for part in m["content"])}
                for m in messages
                if not isinstance(m["content"], str)
            ] + [m for m in messages if isinstance(m["content"], str)]
            return await Renderer.preprocess_chat(self, request, flat)

    renderer: Any = guarded(Joined(TURNS))
    parts = ({"type": "text", "text": text} for text in ("Say ", "a."))
    request = SimpleNamespace(
        vllm_xargs={"kv_protect": "system"},
        model_copy=lambda: request,
        build_chat_params=lambda *_: None,
    )
    message: Any = {"role": "system", "content": parts}
    asyncio.run(renderer.preprocess_chat(request, [message, USER]))
    assert request.vllm_xargs == {"kv_protect": f"0-{len('[system]Say a.[user]') + 1}"}


def test_equal_system_prompts_are_rendered_once_until_they_read_differently() -> None:
    renderer = guarded(Renderer(TURNS))
    for _ in range(3):
        protected(renderer, SYSTEM, USER)
    assert len(renderer.asked) == 3 + 2
    assert [parser for _, parser in renderer.asked[1:3]] == [None, None]
    renderer.clock = "Monday "
    assert protected(renderer, SYSTEM, USER)[1] == "Monday [system]Say a.\n[user]"
    assert len(renderer.asked) == 5 + 3
    for number in range(300):
        protected(renderer, {"role": "system", "content": f"{number}"}, USER)
    count = len(renderer.asked)
    protected(renderer, SYSTEM, USER)
    assert len(renderer.asked) == count + 3


def test_a_server_may_protect_all_chats() -> None:
    renderer = guarded(Renderer(TURNS), "system")
    text = "[system]Say a.\n[user]"
    assert protected(renderer, SYSTEM, USER, said=None) == (f"0-{len(text)}", text)
    assert protected(renderer, SYSTEM, USER, said="5-9")[0] == "5-9"
    assert protected(renderer, SYSTEM, USER, said=7)[0] == 7


def test_who_asks_for_nothing_or_for_numbers_is_left_alone() -> None:
    renderer = guarded(Renderer(TURNS))
    for said in (None, "0-5", "nonsense", 7, [1, 2]):
        assert protected(renderer, SYSTEM, USER, said=said)[0] == said
    assert len(renderer.asked) == 5
    tokenize = SimpleNamespace()
    asyncio.run(renderer.preprocess_chat(tokenize, [SYSTEM, USER], parser=None))
    assert vars(tokenize) == {}


def test_where_nothing_leads_nothing_is_named() -> None:
    renderer = guarded(Renderer("{{ messages[-1]['content'] }}"))
    assert protected(renderer, USER) == (None, "")


def test_a_template_that_cannot_tell_gets_400() -> None:
    template = "{% if messages[-1]['content'] == 'A' %}{{ 1 + 'a' }}{% endif %}" + TURNS
    renderer = guarded(Renderer(template))
    with pytest.raises(VLLMValidationError, match="does not tell where") as caught:
        protected(renderer, SYSTEM, USER)
    assert caught.value.parameter == "vllm_xargs.kv_protect"
    assert "\n" not in str(caught.value)


def test_what_prompts_share_ends_where_the_first_differs_or_ends() -> None:
    assert common_start([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
    assert common_start([[1, 2], [1, 2, 3]]) == 2
    assert common_start([[1], []]) == common_start([]) == 0
