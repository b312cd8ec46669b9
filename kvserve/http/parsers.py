# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's parsers reads the tool calls and thoughts of a model that we know.

vLLM refuses ``tools`` unless ``--tool-call-parser`` and ``--enable-auto-tool-choice``
are set, and which parser a model takes is in its documentation alone. The rows below
say it by the model's type and by what its chat template has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import State
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import load_chat_template
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from kvserve.http.notices import notice
from kvserve.models import EMBEDDED_MODEL

_QWEN = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "llama")


@dataclass(frozen=True)
class Format:
    """How models write what is not their answer.

    Attributes:
        parser: vLLM's name of it.
        types: model types of configurations.
        mark: what the chat template must have besides.
    """

    parser: str
    types: tuple[str, ...]
    mark: str = ""

    def fits(self, model_type: str, template: str) -> bool:
        return model_type in self.types and self.mark in template


TOOL_CALLS = (
    Format("openai", ("gpt_oss",)),
    Format("llama4_pythonic", ("llama4", "llama4_text")),
    Format("gemma4", ("gemma4", "gemma4_text"), "tools"),
    Format("glm45", ("glm4_moe",), "<arg_key>"),
    Format("seed_oss", ("seed_oss",)),
    Format("minimax_m2", ("minimax_m2",)),
    Format("lfm2", ("lfm2", "lfm2_moe"), "tools"),
    Format("olmo3", ("olmo3",), "<function_calls>"),
    Format("mistral", ("mistral", "mixtral", "mistral3"), "[TOOL_CALLS]"),
    Format("granite", ("granite", "granitemoe"), "<|tool_call|>"),
    Format("phi4_mini_json", ("phi3",), "<|tool_call|>"),
    Format("qwen3_coder", _QWEN, "<function="),
    Format("hermes", _QWEN, "<tool_call>"),
    Format("llama3_json", ("llama",), "<|python_tag|>"),
)
"""The first that fits is taken."""
THOUGHTS = (
    Format("openai_gptoss", ("gpt_oss",)),
    Format("glm45", ("glm4_moe",), "<think>"),
    Format("seed_oss", ("seed_oss",)),
    Format("minimax_m2", ("minimax_m2",)),
    Format("qwen3", ("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"), "enable_thinking"),
    Format("deepseek_r1", ("qwen2", "llama"), "<\uff5cAssistant\uff5c><think>"),
)
_FORCED = "xlam"
"""Of the embedded model, which knows no tools: it has no format of its own, so that
what a call must say is forced by the function's schema."""


def choose_parsers(args: argparse.Namespace) -> None:
    """Set the parsers of a known model, unless flags say something of them."""
    model_type, template = _facts(args)
    if not (args.tool_call_parser or args.enable_auto_tool_choice):
        found = _first(TOOL_CALLS, model_type, template)
        if found is None and Path(args.model).name == EMBEDDED_MODEL:
            found = _FORCED
        if found is not None:
            args.tool_call_parser, args.enable_auto_tool_choice = found, True
    if not (args.reasoning_parser or args.reasoning_parser_plugin):
        args.reasoning_parser = _first(THOUGHTS, model_type, template) or ""


def _first(formats: tuple[Format, ...], model_type: str, template: str) -> str | None:
    fitting = (one.parser for one in formats if one.fits(model_type, template))
    return next(fitting, None)


def _facts(args: argparse.Namespace) -> tuple[str, str]:
    """The type of a model and its chat template; empty where they cannot be read.

    What is wrong with a file is said by vLLM, which reads it next.
    """
    try:
        config = _object("config.json", args.model, args.revision)
        return str(config.get("model_type", "")), _template(args)
    except (ValueError, VLLMValidationError):
        return "", ""


def _template(args: argparse.Namespace) -> str:
    if args.chat_template:
        return load_chat_template(args.chat_template) or ""
    where = args.tokenizer or args.model, args.tokenizer_revision or args.revision
    own = get_hf_file_bytes("chat_template.jinja", *where)
    if own is not None:
        return own.decode()
    template = _object("tokenizer_config.json", *where).get("chat_template") or ""
    # Some models have several, by name.
    return template if isinstance(template, str) else json.dumps(template)


def _object(name: str, model: str, revision: str | None) -> dict[str, Any]:
    """Read an object of a model's; an empty one if the file is none or holds none."""
    found = json.loads(get_hf_file_bytes(name, model, revision) or "{}")
    return found if isinstance(found, dict) else {}


def tell_of_unseen_tools(state: State) -> None:
    """Say of a chat whose template shows the model no tools that it sees none."""
    renderer = getattr(state, "online_renderer", None)
    if renderer is not None:
        renderer.render_chat = _told(renderer.render_chat, renderer)


def _told(
    render: Callable[..., Awaitable[Any]], renderer: Any
) -> Callable[..., Awaitable[Any]]:
    async def told(request: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(request, "tools", None)
        choice = getattr(request, "tool_choice", None)
        result = await render(request, *args, **kwargs)
        if asked and choice != "none" and not _shows_tools(renderer):
            notice(
                "the chat template shows the model no tools: it calls one where "
                "tool_choice forces it (`required`, or a function), and knows nothing "
                "of what they do"
            )
        return result

    return told


def _shows_tools(renderer: Any) -> bool:
    if renderer.use_harmony:
        return True
    template = renderer.chat_template
    if template is None:
        tokenizer = renderer.renderer.get_tokenizer()
        template = getattr(tokenizer, "chat_template", None)
    return template is None or "tool" in str(template)
