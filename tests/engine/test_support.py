# SPDX-License-Identifier: Apache-2.0
"""The table of docs/models.md is what start-up checks say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import check_start
from kvserve.errors import UserError
from tests.engine.families import FAMILIES
from tests.engine.harness import EngineSlot
from tests.engine.support import STRUCTURES, Structure
from tests.engine.test_families import PROMPTS, STEPS, assert_same
from tests.reference.families import Family

pytestmark = pytest.mark.engine

SERVED = [one for one in FAMILIES if one.served]
POSITIONS = "sink-recent:recent=96"
SELECTS = "snapkv:capacity=100,window=16"


def starts(model: Path, policy: str, **options: Any) -> bool:
    """Ask whether an engine with these options would start."""
    asked = {
        "model": str(model),
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        **options,
    }
    try:
        check_start(engine_options(PolicySettings(policy), asked))
    except UserError:
        return False
    return True


def structures_of(family: Family) -> list[Structure]:
    return [one for one in STRUCTURES if one.has(family)]


def test_every_family_is_in_the_table() -> None:
    assert [one.name for one in FAMILIES if not structures_of(one)] == []


@pytest.mark.parametrize("family", SERVED, ids=str)
def test_a_start_takes_what_the_table_says(tmp_path: Path, family: Family) -> None:
    model = family.write(tmp_path)
    found, options = structures_of(family), family.engine_options
    assert starts(model, POSITIONS, **options)
    selects = all(one.selecting for one in found)
    assert starts(model, SELECTS, **options) == selects
    shares = all(one.prefix_caching for one in found)
    shared = {**options, "enable_prefix_caching": True}
    assert starts(model, POSITIONS, **shared) == shares
    assert not starts(model, SELECTS, **shared)
    quantised = {**options, "kv_cache_dtype": "int8_per_token_head"}
    assert starts(model, POSITIONS, **quantised) == all(one.quantised for one in found)
    ranks = {**options, "tensor_parallel_size": 2}
    assert starts(model, POSITIONS, **ranks) == all(one.ranks for one in found)


OPTIONS: dict[str, dict[str, Any]] = {
    "ranks": {"tensor_parallel_size": 2},
    "prefixes": {"enable_prefix_caching": True},
    "int8": {"kv_cache_dtype": "int8_per_token_head"},
}
RUNS = [
    ("gpt-oss", "ranks", "sink-recent"),
    ("gpt-oss", "prefixes", "sink-recent"),
    ("gpt-oss", "int8", "sink-recent"),
    ("falcon-h1", "ranks", "sink-recent"),
    ("falcon-h1", "int8", "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option", "policy"), RUNS)
def test_what_starts_replies_as_without_the_option(
    engines: EngineSlot, tmp_path: Path, name: str, option: str, policy: str
) -> None:
    """But over int8, whose rounding may change a reply: there it replies at all."""
    family = next(one for one in FAMILIES if one.name == name)
    model = family.write(tmp_path)
    arguments = {"recent": 96} if policy == "sink-recent" else {}
    replies = []
    for more in ({}, OPTIONS[option]):
        engine = engines.start(
            model, policy, arguments, **{**family.engine_options, **more}
        )
        replies.append(engine.generate(PROMPTS, STEPS))
    expected, found = replies
    if option == "int8":
        assert [len(one.tokens) for one in found] == [STEPS] * len(PROMPTS)
    else:
        assert_same(found, expected, family)
