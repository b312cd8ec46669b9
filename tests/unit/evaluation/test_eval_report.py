# SPDX-License-Identifier: Apache-2.0
"""What a report says of cells."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from kvserve.evaluation.report import Heading, make_tables, remarks, write_report
from kvserve.evaluation.store import Cell, Timing
from kvserve.evaluation.summary import Summary

HEADING = Heading(
    "model", "kvserve eval --task <needle>", {"seed": 0}, {"needle": "a number"}
)


def cell(policy: str, scores: list[float], **others: Any) -> Cell:
    count = len(scores)
    values: dict[str, Any] = {
        "task": "needle",
        "length": 1024,
        "kind": "answers",
        "arguments": {},
        "depths": [(2 * n + 1) / (2 * count) for n in range(count)],
        "replies": [],
        "pages_held": [100] * count,
        "pages_peak": [100] * count,
        "pages_full": [100] * count,
        "page_bytes": 1024,
    }
    return Cell(policy=policy, scores=scores, **{**values, **others})


def small(policy: str, scores: list[float], **others: Any) -> Cell:
    return cell(policy, scores, pages_held=[25] * len(scores), **others)


def test_scores_have_intervals_ratios_and_measured_memory() -> None:
    summary = Summary([cell("full", [1, 1, 1, 1]), small("a", [1, 1, 1, 0])])
    line = summary.line("a", "needle", 1024)
    assert line is not None
    assert (line.score, line.of_full, line.usable) == (0.75, 0.75, True)
    assert line.low == pytest.approx(0.3006, abs=1e-3)
    assert line.memory is not None
    assert (line.memory.held, line.memory.peak) == (0.25, 1.0)
    assert line.memory.bytes == 25 * 1024


def test_speed_is_of_all_replies_over_all_seconds() -> None:
    made = [
        cell("full", [1], timing=Timing(2.0, 100, [0.5])),
        cell("full", [1], task="multikey", timing=Timing(3.0, 50, [1.5])),
    ]
    mean = Summary(made).line("full", "all", 1024)
    assert mean is not None
    assert mean.speed is not None
    assert (mean.speed.tokens_per_second, mean.speed.first_after) == (30, 1)
    (row,) = make_tables(Summary(made))[0].rows
    assert row[6:8] == ["30.0", "1.00"]


def test_a_task_that_the_full_cache_fails_is_unusable_and_in_no_mean() -> None:
    cells = [
        cell("full", [1, 1]),
        small("a", [1, 0]),
        cell("full", [0, 0], task="tracking"),
        small("a", [0, 0], task="tracking"),
    ]
    summary = Summary(cells)
    assert [line.task for line in summary.unusable] == ["tracking"]
    mean = summary.line("a", "all", 1024)
    assert mean is not None
    assert mean.score == 0.5
    assert any(
        "tracking at 1024 tokens is unusable" in x for x in remarks(summary, HEADING)
    )
    assert "(0.00)" in make_tables(summary)[0].markdown()


def test_a_policy_that_lacks_a_task_has_no_mean_beside_the_others() -> None:
    cells = [
        cell("full", [1, 1]),
        cell("full", [1, 1], task="multikey"),
        small("a", [1, 1]),
    ]
    summary = Summary(cells)
    assert summary.line("full", "all", 1024) is not None
    assert summary.line("a", "all", 1024) is None


def test_perplexity_is_compared_by_its_ratio_and_is_in_no_mean() -> None:
    cells = [
        cell("full", [2.0, 2.0], task="perplexity", kind="perplexity"),
        small("a", [2.5, 2.5], task="perplexity", kind="perplexity"),
        cell("full", [1, 1]),
        small("a", [1, 1]),
    ]
    summary = Summary(cells)
    line, mean = (summary.line("a", task, 1024) for task in ("perplexity", "all"))
    assert line is not None
    assert mean is not None
    assert line.score == pytest.approx(math.exp(2.5))
    assert line.of_full == pytest.approx(math.exp(0.5))
    assert mean.score == 1


def test_without_labels_agreement_is_the_score() -> None:
    kind = {"task": "agreement", "kind": "agreement", "divergences": [0.1, 0.3]}
    summary = Summary([cell("full", [1, 1], **kind), small("a", [0.8, 0.9], **kind)])
    mean = summary.line("a", "all", 1024)
    line = summary.line("a", "agreement", 1024)
    assert mean is not None
    assert line is not None
    assert mean.score == pytest.approx(0.85)
    assert line.divergence == pytest.approx(0.2)
    full = summary.line("full", "agreement", 1024)
    assert full is not None
    assert (full.low, full.high) == (1, 1)


def test_instructions_that_the_full_cache_fails_are_still_compared_with_it() -> None:
    kind = {"task": "instructions", "kind": "instructions"}
    summary = Summary(
        [cell("full", [0.5, 0.25], **kind), small("a", [0.25, 0], **kind)]
    )
    assert not summary.unusable
    mean = summary.line("a", "all", 1024)
    assert mean is not None
    assert mean.of_full == pytest.approx(1 / 3)
    assert "0.12, 0.33 of full" in make_tables(summary)[0].markdown()
    assert any("Small models fail many" in x for x in remarks(summary, HEADING))


def test_instructions_that_full_never_follows_are_drawn_all_the_same(
    tmp_path: Path,
) -> None:
    kind = {"task": "instructions", "kind": "instructions"}
    made = [cell("full", [0, 0], **kind), cell("full", [1, 1])]
    made += [small("a", [0.5, 0], **kind), small("a", [1, 0])]
    assert tmp_path / "tasks.png" in write_report(made, HEADING, tmp_path)


def test_repetition_of_long_replies_stands_beside_their_score() -> None:
    summary = Summary([cell("full", [1, 1], task="long-count", distinct=[0.9, 0.7])])
    assert "1.00, distinct 0.80" in make_tables(summary)[0].markdown()
    assert any("text that repeats itself" in x for x in remarks(summary, HEADING))


def test_a_server_that_tells_no_pages_and_has_no_reference_is_reported_as_such() -> (
    None
):
    pages: dict[str, Any] = {"pages_held": [], "pages_peak": [], "pages_full": []}
    summary = Summary([cell("server", [1, 0], **pages)])
    (row,) = make_tables(summary)[0].rows
    assert row[:6] == ["`server`", "-", "-", "0.50", "0.09 to 0.91", "-"]


@pytest.fixture
def cells() -> list[Cell]:
    made = []
    for length in (1024, 4096):
        for task, has_depth in (("needle", True), ("multivalue", False)):
            depths = {} if has_depth else {"depths": [None] * 4}
            kind = {"task": task, "length": length, **depths}
            made += [
                cell("full", [1, 1, 1, 1], **kind),
                small("a:budget=0.25", [1, 1, 0.5, 1], **kind),
                small("a:budget=0.5", [1, 1, 1, 1], **kind),
            ]
    return made


def test_a_report_is_json_markdown_html_and_pictures(
    cells: list[Cell], tmp_path: Path
) -> None:
    written = write_report(cells, HEADING, tmp_path)
    assert {path.name for path in written} == {
        *("report.json", "report.md", "report.html"),
        *("pareto.png", "heat-needle.png", "tasks.png"),
    }
    assert all(path.stat().st_size > 500 for path in written)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["command"] == HEADING.command
    assert len(report["scores"]) == len(cells)
    markdown = (tmp_path / "report.md").read_text()
    assert HEADING.command in markdown
    for name in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (tmp_path / name).exists()


def test_the_page_needs_nothing_beside_itself_and_escapes_what_it_shows(
    cells: list[Cell], tmp_path: Path
) -> None:
    write_report(cells, HEADING, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "&lt;needle&gt;" in page
    assert page.count("data:image/png;base64,") == 3
    assert "a:budget=0.5" in page


def test_the_same_cells_give_the_same_bytes(cells: list[Cell], tmp_path: Path) -> None:
    first = [p.read_bytes() for p in write_report(cells, HEADING, _new(tmp_path, "a"))]
    again = [p.read_bytes() for p in write_report(cells, HEADING, _new(tmp_path, "b"))]
    assert first == again


def _new(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_tables_are_markdown_of_equal_columns(cells: list[Cell]) -> None:
    for table in make_tables(Summary(cells)):
        lines = table.markdown().splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) == 5
