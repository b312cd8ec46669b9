# SPDX-License-Identifier: Apache-2.0
"""A file that is replaced under a running server changes nothing that it serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvserve.engine.settings import PolicySettings
from kvserve.errors import UserError
from kvserve.http.engine import profiles_of
from kvserve.plan import streaming
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import rule_named
from kvserve.plan.streaming import StreamRule
from policies import files
from policies.base import ModelShape, StreamingPolicy
from policies.moa import MoA
from policies.registry import create_policy
from policies.retrieval import Retrieval
from policies.sink_recent import SinkRecent

MODEL = ModelShape("model", 2, 2, 2, 64)
PAGE, LONGEST = 32, 4096


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    files.forget()
    yield
    files.forget()


def write_gates(path: Path, gates: list[list[float]]) -> None:
    path.write_text("\n".join("\t".join(map(str, row)) for row in gates))


def write_spans(path: Path, beta: float) -> None:
    plan = {"alphas": [[0, 0]] * 2, "betas": [[beta] * 2] * 2}
    path.write_text(json.dumps(plan))


def test_requests_of_every_length_have_the_plan_of_the_start(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_spans(path, 0.25)
    rule = StreamRule(MoA(plan=str(path)), MODEL, PAGE, LONGEST)
    expected = [rule.plan(length) for length in range(1000, 1100)]
    for damage in (lambda: write_spans(path, 0.75), path.unlink):
        damage()
        # More lengths than the cache of plans holds, in whatever order they come.
        assert [rule.plan(length) for length in range(1000, 1100)] == expected


def test_a_request_that_names_the_policy_gets_the_profile_of_the_start(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gates.tsv"
    write_gates(path, [[0.9, 0.1], [0.1, 0.1]])
    policy = Retrieval(profile=str(path), full_ratio=0.25)
    rule = MixedRule(StreamRule(policy, MODEL, PAGE, LONGEST))
    expected = rule_named(rule, "retrieval:recent=64", 1000).plan(1000)
    write_gates(path, [[0.1, 0.1], [0.1, 0.9]])
    streaming._plan.cache_clear()
    assert rule_named(rule, "retrieval:recent=64", 1000).plan(1000) == expected
    other = rule_named(rule, "retrieval:recent=64,full_ratio=0.5", 1000).plan(1000)
    assert other.windows[0][0] == 0


def test_the_server_names_the_profile_that_it_serves(tmp_path: Path) -> None:
    path = tmp_path / "gates.tsv"
    write_gates(path, [[0.9, 0.1], [0.1, 0.1]])
    policy = Retrieval(profile=str(path))
    policy.budgets(MODEL, LONGEST)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    write_gates(path, [[0.1, 0.1], [0.1, 0.9]])
    (found,) = profiles_of(policy, MODEL.name)
    assert found.sha256 == before


@pytest.mark.parametrize(
    ("policy", "parameter"), [(Retrieval(), "profile"), (MoA(), "plan")]
)
def test_what_ships_is_named_by_the_parameter_that_would_replace_it(
    policy: StreamingPolicy, parameter: str
) -> None:
    (found,) = profiles_of(policy, "SmolLM2-135M-Instruct")
    assert found.parameter == parameter
    name = {"profile": "retrieval.json", "plan": "moa.json"}[parameter]
    assert Path(found.path).parts[-2:] == ("SmolLM2-135M-Instruct", name)
    assert profiles_of(SinkRecent(), "SmolLM2-135M-Instruct") == []


def test_a_file_of_a_policy_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('policy = "sink-recent"\nrecent = 96\n')
    before = create_policy(str(path))
    path.write_text('policy = "full"\n')
    assert create_policy(str(path)) == before


def test_an_engine_that_starts_later_reads_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_spans(path, 0.25)
    rule = StreamRule(MoA(plan=str(path)), MODEL, PAGE, LONGEST)
    before = rule.plan(2000)
    write_spans(path, 0.75)
    files.forget()
    assert rule.plan(2000) != before


def test_processes_of_a_server_agree_on_a_file_or_do_not_start(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('policy = "full"\n')
    files.read_bytes(path)
    config: Any = SimpleNamespace(
        additional_config={
            "kvserve": {"policy": str(path), "files": files.digests()},
        }
    )
    files.forget()  # another process
    assert PolicySettings.from_config(config).spec.name == "full"
    files.forget()
    path.write_text('policy = "sink-recent"\n')
    settings = PolicySettings.from_config(config)
    with pytest.raises(UserError, match=r"mine.toml: was replaced while the server"):
        _ = settings.spec
