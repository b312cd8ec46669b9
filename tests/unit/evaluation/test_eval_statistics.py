# SPDX-License-Identifier: Apache-2.0
"""Intervals, and the search for a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.evaluation.finder import STEPS, Probe, find_budget, serve_command
from kvserve.evaluation.statistics import bootstrap, interval, wilson
from policies.budgets import PolicySpec


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    # Of statsmodels.stats.proportion.proportion_confint(method="wilson").
    [
        (16, 16, (0.8064, 1.0)),
        (0, 10, (0.0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (15, 16, (0.7167, 0.9889)),
    ],
)
def test_wilson_is_the_textbooks(
    successes: int, count: int, expected: tuple[float, float]
) -> None:
    assert wilson(successes, count) == pytest.approx(expected, abs=1e-4)


def test_right_and_wrong_get_wilson_and_shares_get_bootstrap() -> None:
    assert interval([1, 0, 1, 1]) == wilson(3, 4)
    assert interval([0.25, 0.5, 1]) == bootstrap([0.25, 0.5, 1])


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(1).normal(2, 1, 400)
    half = 1.96 * values.std() / 20
    low, high = bootstrap(list(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(list(values)) == (low, high)


@given(st.integers(1, STEPS - 1))
def test_the_finder_finds_the_least_budget_that_holds(least: int) -> None:
    tried: list[float] = []

    def measure(share: float) -> Probe | None:
        tried.append(share)
        if share < 0.04:
            return None
        return Probe(share, 1.0 if share >= least / STEPS else 0.5, share + 0.01)

    best, probes = find_budget(0.99, measure)
    assert best is not None
    assert best.share == pytest.approx(max(least, 2) / STEPS)
    assert len(tried) <= 6
    assert len(probes) <= len(tried)


def test_the_finder_says_so_if_only_the_full_cache_holds() -> None:
    best, probes = find_budget(0.99, lambda share: Probe(share, 0.9, share))
    assert best is None
    assert probes


def test_of_the_probes_that_hold_the_one_of_least_memory_is_chosen() -> None:
    held = {0.5: 0.3, 0.24: 0.4}

    def measure(share: float) -> Probe:
        return Probe(share, float(share in held), held.get(share, share))

    best, _ = find_budget(1.0, measure)
    assert best == Probe(0.5, 1.0, 0.3)


def test_the_serve_command_names_model_policy_and_parameters() -> None:
    spec = PolicySpec.parse("retrieval")
    command = serve_command("some/model", spec, {"recent": 96, "sinks": 32}, 4096)
    assert command == (
        "kvserve serve some/model --policy retrieval --policy-arg recent=96 "
        "--policy-arg sinks=32 --max-model-len 4096"
    )
    assert serve_command(None, spec, {}, 64).startswith("kvserve serve --policy")
