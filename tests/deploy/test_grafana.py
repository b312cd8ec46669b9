# SPDX-License-Identifier: Apache-2.0
"""The dashboard: what the code generates, of queries that parse."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType
from typing import Any

import promql_parser
import pytest

from tests.deploy.conftest import DEPLOY

_FOLDER = DEPLOY / "grafana"


def load_generator() -> ModuleType:
    """Import dashboard.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "kvserve_dashboard", _FOLDER / "dashboard.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_dashboard() -> dict[str, Any]:
    """The committed JSON."""
    text = (_FOLDER / "dashboards" / "kvserve.json").read_text()
    board: dict[str, Any] = json.loads(text)
    return board


def panels() -> list[dict[str, Any]]:
    """Panels that show something: rows do not."""
    return [panel for panel in load_dashboard()["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every query by `panel title / curve`, variables filled in."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            name = f"{panel['title']} / {target['legendFormat']}"
            filled = target["expr"].replace("$__rate_interval", "10s")
            found[name] = filled.replace("$instance", ".*")
    return found


def test_the_committed_dashboard_is_what_the_code_generates() -> None:
    committed = (_FOLDER / "dashboards" / "kvserve.json").read_text()
    assert load_generator().render() == committed, "run `make dashboard`"


@pytest.mark.parametrize("name", queries())
def test_every_query_parses(name: str) -> None:
    query = queries()[name]
    assert "$" not in query
    promql_parser.parse(query)


def test_every_query_of_a_panel_has_its_own_letter() -> None:
    for panel in panels():
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]


def test_panels_have_distinct_ids_and_do_not_overlap() -> None:
    board = load_dashboard()["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    cells = [
        (x, y)
        for panel in board
        for x in range(
            panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]
        )
        for y in range(
            panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_panel_has_a_unit_and_says_what_it_means() -> None:
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]


def test_every_query_obeys_the_choice_of_instance() -> None:
    for panel in panels():
        for target in panel["targets"]:
            names = re.findall(r"\b(?:vllm:|kvserve_)\w+", target["expr"])
            assert names
            assert target["expr"].count('{instance=~"$instance"}') == len(names)
