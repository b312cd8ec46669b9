# SPDX-License-Identifier: Apache-2.0
"""Choosing rules by integer programming, against trying every plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvserve.profiling.elastic import (
    Choice,
    Problem,
    candidate_rules,
    densities,
    num_solves,
    pareto_plans,
    rule_losses,
    solve,
    undominated,
)
from policies.moa import span

LAYERS, HEADS = 2, 3
SHARES = np.array([[0.2, 0.4, 0.6, 0.9], [0.1, 0.4, 0.7, 0.8]])


def problem(seed: int, budget: float = 0.5, lengths: int = 2) -> Problem:
    """Losses that fall with what a rule keeps, apart from noise."""
    rng = np.random.default_rng(seed)
    losses = rng.random((lengths, LAYERS * HEADS, 4)) * (1 - SHARES[:lengths, None])
    return Problem(losses, SHARES[:lengths], budget, LAYERS)


def allowed(task: Problem) -> list[Choice]:
    """Every plan that the paper allows, by trying all of them."""
    _, heads, rules = task.losses.shape
    plans = map(np.array, itertools.product(range(rules), repeat=heads))
    return [choice for choice in plans if is_allowed(task, choice)]


def is_allowed(task: Problem, choice: Choice) -> bool:
    shares = task.densities[:, choice].mean(axis=1)
    few = all(len(set(layer)) <= 2 for layer in choice.reshape(LAYERS, -1).tolist())
    within = 0.9 * task.budget - 1e-9 <= shares.min() <= shares.max()
    return few and bool(within) and shares.max() <= task.budget + 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("primary", [0, 1])
def test_the_best_plan_is_found(seed: int, primary: int) -> None:
    task = problem(seed)
    found = solve(task, primary, {})
    best = min(task.objectives(choice)[primary] for choice in allowed(task))
    assert found is not None
    assert is_allowed(task, found)
    assert task.objectives(found)[primary] <= best * (1 + 2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_limit_on_another_length_holds(seed: int) -> None:
    task = problem(seed)
    costs = [task.objectives(choice) for choice in allowed(task)]
    limit = float(np.median([cost[1] for cost in costs]))
    found = solve(task, 0, {1: limit})
    assert found is not None
    best = min(cost[0] for cost in costs if cost[1] <= limit)
    assert task.objectives(found)[1] <= limit * (1 + 1e-6)
    assert task.objectives(found)[0] <= best * (1 + 2e-3)


def test_a_budget_that_no_plan_meets_has_none() -> None:
    assert solve(problem(0, budget=0.05), 0, {}) is None
    assert pareto_plans(problem(0, budget=0.05), 2, lambda: None) == []


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_kept_is_worse_than_another_at_all_lengths(seed: int) -> None:
    task = problem(seed)
    steps: list[None] = []
    plans = pareto_plans(task, 3, lambda: steps.append(None))
    assert len(steps) == num_solves(2, 3) == 2 + 2 * 3
    costs = [task.objectives(plan) for plan in plans]
    for one, other in itertools.permutations(costs, 2):
        assert not (one <= other).all()
    assert all(is_allowed(task, plan) for plan in plans)


def test_equal_plans_are_kept_once() -> None:
    task = problem(1)
    plan = solve(task, 0, {})
    assert plan is not None
    assert len(undominated(task, [plan, plan.copy()])) == 1


def test_rules_keep_something_of_every_length_and_never_more_than_all() -> None:
    lengths, longest = [1024, 2048, 4096], 6144
    rules = candidate_rules(lengths, longest)
    for alpha, beta in rules:
        assert alpha + beta * 1024 > 0
        assert alpha + beta * 4096 <= 4096
        assert alpha + beta * longest <= longest
    kept = [tuple(span(*rule, n) for n in [*lengths, longest]) for rule in rules]
    assert len(set(kept)) == len(kept)
    assert (0.0, 1.0) in rules


def test_densities_are_those_of_the_spans_that_are_served() -> None:
    shares = densities([(0.0, 0.5), (128.0, 0.0)], [1024, 2048])
    assert shares.tolist() == [[0.5, 0.125], [0.5, 0.0625]]


def test_a_rule_costs_what_its_window_beside_the_sinks_costs() -> None:
    curves = np.array([[0.0, 9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0]])
    rules = [(128.0, 0.0), (256.0, 0.0), (0.0, 0.75), (0.0, 1.0)]
    losses = rule_losses(curves, rules, 512, 64)
    # 128 tokens are a block of sinks and a window of one block.
    assert losses.tolist() == [[9.0, 3.0, 1.0, 0.0]]
