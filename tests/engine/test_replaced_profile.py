# SPDX-License-Identifier: Apache-2.0
"""A running server goes on with the plan that it was started with."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Model
from tests.engine.harness import random_prompts
from tests.engine.servers import running_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LENGTHS = [200, 333, 700]


def ask(base: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{base}{path}",
        json.dumps(body).encode() if body else None,
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def replies(base: str, prompts: list[list[int]], tokens: int) -> list[str]:
    body = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return [
        ask(base, "/v1/completions", {"prompt": prompt, **body})["choices"][0]["text"]
        for prompt in prompts
    ]


def test_a_plan_that_is_replaced_changes_no_reply(
    models: dict[str, Model], tmp_path: Path
) -> None:
    model = models["tiny-gqa"]
    plan = tmp_path / "moa.json"
    plan.write_bytes(model.plan.read_bytes())
    flags = [
        *(str(model.path), "--policy", "moa", "--policy-arg", f"plan={plan}"),
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", "64M"),
    ]
    prompts = random_prompts(LENGTHS, model.vocab, seed=3)
    with running_server(flags, tmp_path / "log") as base:
        before = ask(base, "/v1/kv/policy")
        # A reply of one token more has a plan of its own, made from the file's spans.
        expected = replies(base, prompts, 16)
        for content in (model.wide_plan.read_text(), "no plan at all", None):
            if content is None:
                plan.unlink()
            else:
                plan.write_text(content)
            assert replies(base, prompts, 16) == expected
            longer = replies(base, prompts, 17)
            assert [
                text[: len(one)] for text, one in zip(longer, expected, strict=True)
            ] == expected
            assert ask(base, "/v1/kv/policy") == before
            longest = ask(base, "/v1/kv/plan?context=900")
            assert longest["kept"] < 1
