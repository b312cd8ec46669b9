# SPDX-License-Identifier: Apache-2.0
"""Agents: what they say follows from a seed or a file, and each turn from the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.bench.agents import Agent, AgentLoad, Turn, agents_in
from kvserve.bench.agents_result import AgentsResult, draw, table
from kvserve.bench.command import bench
from kvserve.bench.conversations import Said, talk
from kvserve.bench.scrape import Sample
from kvserve.bench.workloads import read_lines, write_workload
from kvserve.errors import UserError
from tests.unit.bench.test_bench_client import _Server, url

__all__ = ["url"]

_SYSTEM = {"role": "system", "content": "be brief"}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_a_seed_is_a_load_whose_agents_share_one_beginning(
    seed: int, agents: int, turns: int
) -> None:
    load = AgentLoad(agents, turns, shared=200, new=50, reply=7)
    drawn = load.draw(seed)
    assert drawn == load.draw(seed)
    assert drawn[0] != load.draw(seed + 1)[0]
    assert len(drawn) == agents
    assert len({agent.system for agent in drawn}) == 1
    texts = [turn.user for agent in drawn for turn in agent.turns]
    assert len(texts) == len(set(texts)) == agents * turns
    assert all(turn.output_tokens == 7 for agent in drawn for turn in agent.turns)
    # More agents do not change the first ones.
    assert AgentLoad(agents + 1, turns, 200, 50, 7).draw(seed)[:agents] == drawn


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, agents = tmp_path / "a.jsonl", AgentLoad(3, 2, 50, 20, 5).draw(0)
    write_workload(path, agents)
    assert agents_in(read_lines(path)) == agents
    shorter = agents_in(read_lines(path), output_tokens=2)
    assert shorter is not None
    assert {turn.output_tokens for one in shorter for turn in one.turns} == {2}


def test_a_file_of_requests_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Hello", "output_tokens": 3}\n')
    assert agents_in(read_lines(path)) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"turns": []}, "turns must be a list"),
        ({"turns": [{"output_tokens": 3}]}, "needs a text as user"),
        ({"turns": [{"user": "a"}]}, "output_tokens must be a whole number"),
        ({"turns": [{"user": "a", "output_tokens": 1, "think": -1}]}, "think must be"),
        ({"turns": [{"user": "a", "output_tokens": 1}], "start": "now"}, "start must"),
        ({"turns": [{"user": "a", "output_tokens": 1}], "system": 3}, "system must be"),
    ],
)
def test_a_line_that_is_no_agent_is_named(
    tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    path, right = tmp_path / "a.jsonl", {"turns": [{"user": "a", "output_tokens": 1}]}
    path.write_text(f"{json.dumps(right)}\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=f"line 2: .*{said}"):
        agents_in(read_lines(path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--turns", "3"], "--turns: is of --workload agents alone"),
        (["--workload", "agents", "--rate", "2"], "--rate: --workload agents has"),
        (["--workload", "agents", "--think", "-1"], "--think -1.0: must be above 0"),
        (["--workload", "agents", "--agents", "0"], "--agents 0: must be above 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench(flags)


def test_a_turn_sends_all_that_was_said_before(url: str) -> None:
    turns = (Turn("one", 8), Turn("two", 8))
    said, seconds = talk(url, "m", [Agent("be brief", turns)], progress=False)
    assert [one.turn for one in said] == [0, 1]
    assert [one.output_tokens for one in said] == [8, 8]
    assert 0 < said[0].ttft < seconds
    first, second = (body["messages"] for body in _Server.seen)
    assert first == [_SYSTEM, {"role": "user", "content": "one"}]
    replied = {"role": "assistant", "content": "ab c de f g h"}
    assert second == [*first, replied, {"role": "user", "content": "two"}]


def test_an_agent_whose_turn_fails_says_no_more(url: str) -> None:
    failing = Agent("", (Turn("break", 8), Turn("never", 8)))
    other = Agent("", (Turn("one", 8), Turn("two", 8)))
    said, _ = talk(url, "m", [failing, other], progress=False)
    assert sorted(one.turn for one in said if not one.error) == [0, 1]
    assert [one.error for one in said if one.error] == [
        "the stream broke off after 4 tokens"
    ]


def _result(policy: str, faster: float = 1.0) -> AgentsResult:
    said = [
        Said(turn, (1 + turn) / faster, [0.1], 100 * (turn + 1), 2, "")
        for turn in (0, 0, 1, 1)
    ]
    said.append(Said(1, 9.0, [], 0, 0, "gone"))
    timeline = [
        Sample(0, 0, 0, 0.0, 3, 100, 50),
        Sample(1, 2, 1, 0.5, 5, 300, 150),
        Sample(4, 0, 0, 0, 5, 500, 350),
    ]
    return AgentsResult(policy, 60.0 / faster, timeline, said)


def test_what_was_answered_is_shown_by_policy_and_by_turn() -> None:
    first, second = table([_result("none"), _result("full", 2.0)]).split("\n\n")[::2]
    assert "| none | 4.0 | 1.00 | 1.50 | 1.00 | 2.00 | 75% | 2 | 50% | 2 | 1 |" in first
    assert "| full | 8.0 | 2.00 | 0.75 | 0.50 | 1.00 | 75% |" in first
    assert "| none | 1.00 | 2.00 |\n| full | 0.50 | 1.00 |" in second


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "title", [_result("none"), _result("full", 2.0)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = _result("none").to_json()
    assert found["ttft_p50_by_turn"] == [1.0, 2.0]
    assert found["prefix_hit_rate"] == 0.75
