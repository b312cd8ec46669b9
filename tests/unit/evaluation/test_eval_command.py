# SPDX-License-Identifier: Apache-2.0
"""``kvserve eval`` as it is typed, with engines that answer at once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from kvserve.cli import main
from kvserve.evaluation import command
from kvserve.evaluation.arguments import add_arguments
from kvserve.evaluation.assignments import assignments_of
from kvserve.evaluation.catalogue import groups
from kvserve.evaluation.contenders import LocalEngine, PolicyContender
from kvserve.evaluation.model import EvaluatedModel
from kvserve.texts.haystack import load_book
from policies.base import ModelShape
from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.fake_backend import FakeBackend

SHAPE = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64)
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which there is nothing but its tokenizer."""
    made = EvaluatedModel("path", SHAPE, 8192, TOKENIZER, 1)
    monkeypatch.setattr(command, "load_model", lambda _: made)


def share_of(arguments: dict[str, Any]) -> float:
    return arguments.get("capacity", 2048) / 2048


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines that say what they know, and hold what their budget says."""
    names: list[str] = []

    def open_backend(self: PolicyContender, arguments: dict[str, Any]) -> FakeBackend:
        names.append(self.name)
        return Knowing(share_of(arguments))

    monkeypatch.setattr(PolicyContender, "open", open_backend)
    return names


class Knowing(FakeBackend):
    """Answers the last number of the prompt if it holds 40 % of it."""

    def __init__(self, share: float) -> None:
        super().__init__(0, round(100 * share), [])
        self._share = share

    def _reply(self, number: int, request: Any) -> Any:
        import dataclasses
        import re

        reply = super()._reply(number, request)
        prompt = TOKENIZER.decode(request.prompt)
        (found,) = re.findall(r"is: (\d{5})", prompt)
        return dataclasses.replace(reply, text=found if self._share >= 0.4 else "?")


def evaluate(out: Path, *arguments: str) -> int:
    return main(["eval", "--out", str(out), "--samples", "4", *arguments])


def test_a_report_is_written_and_full_is_run_to_compare_with(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    policy = ("--policy", "snapkv:budget=0.25", "--policy", "snapkv:budget=0.5")
    assert evaluate(tmp_path, *policy, "--length", "2048") == 0
    assert opened == ["full", "snapkv:budget=0.25", "snapkv:budget=0.5"]
    shown = capsys.readouterr().out
    assert "| `snapkv:budget=0.5` | 50%, " in shown
    report = json.loads((tmp_path / "report.json").read_text())
    scores = {line["policy"]: line["score"] for line in report["overall"]}
    assert scores == {"full": 1, "snapkv:budget=0.25": 0, "snapkv:budget=0.5": 1}
    assert report["arguments"]["snapkv:budget=0.5 at 2048"] == {"capacity": 1024}
    assert "--length 2048" in report["command"]


def test_the_same_command_again_starts_no_engine(
    tmp_path: Path, opened: list[str]
) -> None:
    for _ in range(2):
        assert evaluate(tmp_path, "--length", "2048") == 0
    assert opened == ["full"]


def test_more_policies_and_lengths_join_what_is_there(
    tmp_path: Path, opened: list[str]
) -> None:
    evaluate(tmp_path, "--length", "2048")
    evaluate(tmp_path, "--length", "2048", "--policy", "snapkv")
    assert opened == ["full", "snapkv"]


def test_ctrl_c_keeps_what_is_done_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    normal = PolicyContender.open

    def stopped(self: PolicyContender, arguments: dict[str, Any]) -> Any:
        if self.name == "snapkv":
            raise KeyboardInterrupt
        return normal(self, arguments)

    monkeypatch.setattr(PolicyContender, "open", stopped)
    assert evaluate(tmp_path, "--length", "2048", "--policy", "snapkv") == 130
    assert "1 finished cells are kept" in capsys.readouterr().err
    monkeypatch.setattr(PolicyContender, "open", normal)
    assert evaluate(tmp_path, "--length", "2048", "--policy", "snapkv") == 0
    assert opened == ["full", "snapkv"]


def test_the_finder_prints_how_to_serve_the_least_budget(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--find-budget", "0.99", "--policy", "snapkv", "--length", "2048")
    assert evaluate(tmp_path, *asked) == 0
    shown = capsys.readouterr().out
    # 40 % of 2048 tokens are 819, and a page less is too little.
    assert "snapkv:budget=0.42 keeps 100.0% of the full score" in shown
    assert (
        "kvserve serve --policy snapkv --policy-arg capacity=832 --max-model-len 2048"
        in shown
    )
    assert len(opened) <= 7
    assert (tmp_path / "report.html").exists()


def test_a_ladder_is_every_policy_at_every_budget_that_it_can_have(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--budgets", "ladder", "--policy", "snapkv", "--policy", "h2o:budget=0.9")
    assert evaluate(tmp_path, *asked, "--length", "960,2048") == 0
    rungs = [f"snapkv:budget={share}%" for share in (50, 25, 12.5, 6.25)]
    assert list(dict.fromkeys(opened)) == ["full", *rungs, "h2o:budget=0.9"]
    shown = capsys.readouterr().out
    # 6.25 % of 960 tokens are a page, and a head needs two.
    assert "Not measured at 960 tokens: --policy snapkv:budget=6.25%: " in shown
    tables = shown.split("960 tokens\n")[1].split("2048 tokens\n")
    assert "snapkv:budget=12.5%" in tables[0]
    assert "`snapkv:budget=6.25%`" not in tables[0]
    assert "`snapkv:budget=6.25%`" in tables[1]
    page = (tmp_path / "report.md").read_text()
    assert "Not measured at 960 tokens" in page


def test_a_table_has_memory_score_and_speed_of_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, "--length", "2048") == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("| policy"))
    assert head.split(" | ")[1:8] == [
        *("KV held", "KV peak", "score", "95 %", "of full", "tokens/s", "TTFT s")
    ]
    (mean,) = json.loads((tmp_path / "report.json").read_text())["overall"]
    assert mean["speed"]["tokens_per_second"] > 0


@pytest.mark.parametrize("name", ["needle", "needle-before"])
def test_a_file_that_is_called_like_a_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text('{"prompt": "Who?", "answer": "Anne"}\n')
    assert evaluate(tmp_path / "out", "--task", str(path)) == 2
    assert "is called like a task that ships" in capsys.readouterr().err


def test_both_places_of_a_question_stand_side_by_side(tmp_path: Path) -> None:
    asked = ("--length", "2048", "--task", "needle", "--question", "both")
    assert evaluate(tmp_path, *asked) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["tasks"]) == ["needle", "needle-before"]


def test_ruler_is_all_of_its_tasks_once() -> None:
    args = parse("--task", "vt,ruler", "--samples", "1")
    made = assignments_of(args, [4000], TOKENIZER, load_book("persuasion"))
    assert [one.task.name for one in made] == list(groups()["ruler"])


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "needles"], "--task needles: unknown; choose among needle"),
        (["--length", "1e3"], "expected numbers of tokens"),
        (["--length", "0"], "must be a number of tokens"),
        (["--length", "9000"], "reads at most 8192 tokens"),
        (["--samples", "0"], "--samples 0: must be at least 1"),
        (["--policy", "snap"], "--policy snap: unknown"),
        (["--policy", "full:budget=0.5"], "takes no budget"),
        (["--haystack", "/nowhere"], "--haystack /nowhere: cannot be read"),
        (["--task", "none.jsonl"], "--task none.jsonl: cannot be read"),
        (["--kv-memory", "lots"], "--kv-memory lots: expected a size"),
        (["--url", "http://127.0.0.1:9"], "no server answers"),
        (["--protect", "system"], "--protect: no prompt has a system prompt"),
        (
            ["--protect", "system", "--task", "leak", "--url", "http://127.0.0.1:9"],
            "--protect: a server is started with it",
        ),
        (["--find-budget", "2", "--policy", "h2o"], "must lie in 0 to 1"),
        (["--budgets", "ladder"], "--budgets: whose?"),
        (["--budgets", "50%,much", "--policy", "h2o"], "--budgets 50%,much: give"),
        (
            ["--find-budget", "0.9", "--policy", "h2o", "--budgets", "ladder"],
            "no --url or --budgets",
        ),
        (
            ["--policy", "kvzap:budget=50%..25%"],
            "what a server does when requests wait",
        ),
        (["--find-budget", "0.9"], "give exactly one --policy"),
        (["--find-budget", "0.9", "--policy", "full"], "`full` has no budget"),
        (
            ["--find-budget", "0.9", "--policy", "h2o:budget=0.5"],
            "--find-budget sets its budget",
        ),
        (
            ["--find-budget", "0.9", "--policy", "h2o", "--length", "512,1024"],
            "give one --length",
        ),
    ],
)
def test_bad_input_is_one_line_before_any_engine_starts(
    tmp_path: Path,
    opened: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert evaluate(tmp_path / "out", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not opened


def test_an_empty_haystack_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert evaluate(tmp_path, "--haystack", str(tmp_path / "empty.txt")) == 2
    assert "has 0 characters" in capsys.readouterr().err


def test_results_of_another_seed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, "--length", "2048") == 0
    capsys.readouterr()
    assert evaluate(tmp_path, "--length", "2048", "--seed", "1") == 2
    assert "results with seed 0, and this command has 1" in capsys.readouterr().err


def test_results_of_spared_system_prompts_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, "--length", "2048") == 0
    capsys.readouterr()
    protected = ("--protect", "system", "--task", "system-facts")
    assert evaluate(tmp_path, "--length", "2048", *protected) == 2
    assert "results with protect None, and this command has system" in (
        capsys.readouterr().err
    )


def test_a_pool_holds_eight_full_requests_unless_it_is_given() -> None:
    model = EvaluatedModel("path", SHAPE, 8192, TOKENIZER, 1)
    page = 2 * 64 * 32 * 2
    needed = 8 * 30 * 3 * (4096 // 32) * page
    assert needed < LocalEngine(model, "bfloat16", 4096).pool() < 1.1 * needed
    assert LocalEngine(model, "bfloat16", 4096, 1 << 20).pool() == 1 << 20
