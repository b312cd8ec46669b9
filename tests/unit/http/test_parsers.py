# SPDX-License-Identifier: Apache-2.0
"""Which parsers a model gets when nobody names one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from kvserve.http.parsers import THOUGHTS, TOOL_CALLS, choose_parsers

_HERMES = "{% if tools %}<tool_call>{{ tools }}{% endif %}"
_CODER = "{% if tools %}<tool_call>\n<function=...>{% endif %}"
_THINKS = f"{_HERMES}{{% if enable_thinking %}}{{% endif %}}"


def chosen(folder: Path, **flags: Any) -> tuple[str | None, bool, str]:
    nothing_said = {
        "model": str(folder),
        "tokenizer": None,
        "revision": None,
        "tokenizer_revision": None,
        "chat_template": None,
        "tool_call_parser": None,
        "enable_auto_tool_choice": False,
        "reasoning_parser": "",
        "reasoning_parser_plugin": None,
    }
    args = argparse.Namespace(**{**nothing_said, **flags})
    choose_parsers(args)
    return args.tool_call_parser, args.enable_auto_tool_choice, args.reasoning_parser


def write(folder: Path, model_type: str, template: str, beside: bool = False) -> Path:
    """Write what is read of a model, with its template in a file of its own or not."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = {} if beside else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if beside:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("model_type", "template", "expected"),
    [
        ("qwen2", _HERMES, ("hermes", True, "")),
        ("qwen3", _THINKS, ("hermes", True, "qwen3")),
        ("qwen3_moe", _CODER, ("qwen3_coder", True, "")),
        ("llama", "<|python_tag|>", ("llama3_json", True, "")),
        ("gpt_oss", "", ("openai", True, "openai_gptoss")),
        ("glm4_moe", "<arg_key><think>", ("glm45", True, "glm45")),
        ("qwen2", "no such thing", (None, False, "")),
        ("unheard-of", _HERMES, (None, False, "")),
    ],
)
def test_known_models_get_their_parsers(
    tmp_path: Path,
    beside: bool,
    model_type: str,
    template: str,
    expected: tuple[str | None, bool, str],
) -> None:
    assert chosen(write(tmp_path, model_type, template, beside)) == expected


def test_what_flags_say_stays(tmp_path: Path) -> None:
    model = write(tmp_path, "qwen3", _THINKS)
    assert chosen(model, tool_call_parser="xlam") == ("xlam", False, "qwen3")
    assert chosen(model, enable_auto_tool_choice=True) == (None, True, "qwen3")
    assert chosen(model, reasoning_parser="mimo")[2] == "mimo"
    assert chosen(model, chat_template="{{ messages }}") == (None, False, "")


def test_a_model_that_cannot_be_read_gets_none(tmp_path: Path) -> None:
    assert chosen(tmp_path) == (None, False, "")
    assert chosen(tmp_path / "missing") == (None, False, "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{bad", b"[]", b"null", b"\xff\xfe", b""])
def test_a_file_that_is_broken_is_left_to_vllm_to_tell_of(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (write(tmp_path, "qwen3", _THINKS) / name).write_bytes(content)
    assert chosen(tmp_path) == (None, False, "")


def test_a_template_of_the_users_counts_instead_of_the_models(tmp_path: Path) -> None:
    model = write(tmp_path, "qwen3", "no such thing")
    template = tmp_path / "own.jinja"
    template.write_text(_HERMES)
    assert chosen(model, chat_template=str(template)) == ("hermes", True, "")
    missing = str(tmp_path / "missing.jinja")
    assert chosen(model, chat_template=missing) == (None, False, "")


def test_the_embedded_model_may_be_forced_to_call(tmp_path: Path) -> None:
    model = write(tmp_path / "SmolLM2-135M-Instruct", "llama", "{{ messages }}")
    assert chosen(model) == ("xlam", True, "")


def test_vllm_has_every_parser_that_is_named() -> None:
    tools = {one.parser for one in TOOL_CALLS} | {"xlam"}
    assert tools <= set(ToolParserManager.list_registered())
    thoughts = {one.parser for one in THOUGHTS}
    assert thoughts <= set(ReasoningParserManager.list_registered())
