# SPDX-License-Identifier: Apache-2.0
"""Prometheus' configuration and rules, checked by promtool."""

from __future__ import annotations

from tests.deploy.conftest import DEPLOY, load_yaml, run_tool

_FOLDER = DEPLOY / "prometheus"


def rules() -> list[dict[str, str]]:
    """Every rule of every file."""
    return [
        rule
        for file in sorted((_FOLDER / "rules").glob("*.yml"))
        for group in load_yaml(file)["groups"]
        for rule in group["rules"]
    ]


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    shown = run_tool("promtool", "check", "config", _FOLDER / "prometheus.yml")
    assert "2 rule files found" in shown


def test_the_rules_pass_their_unit_tests() -> None:
    assert "SUCCESS" in run_tool("promtool", "test", "rules", _FOLDER / "tests.yml")


def test_every_rule_has_a_unit_test() -> None:
    text = (_FOLDER / "tests.yml").read_text()
    for rule in rules():
        if "alert" in rule:
            assert f"alertname: {rule['alert']}\n" in text, rule["alert"]
        else:
            assert f"expr: {rule['record']}\n" in text, rule["record"]


def test_the_scraped_path_keeps_vllms_names() -> None:
    (job,) = load_yaml(_FOLDER / "prometheus.yml")["scrape_configs"]
    assert job["job_name"] == "kvserve"
    assert job["metrics_path"] == "/metrics"
