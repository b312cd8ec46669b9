# SPDX-License-Identifier: Apache-2.0
"""Choose an elastic rule for every KV head, by integer programming.

Source: MoA (arXiv 2406.14909, sections 4.1 and 4.3). A rule keeps
``alpha + beta * length`` tokens of a head. Every head gets one rule, a layer at most
two different ones, and at each length the mean density of all heads is between 0.9 of
the budget and the budget. There is a loss to minimise for each length, so there is no
best plan but a set of them, none better than another at all lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import (  # type: ignore[import-untyped]
    Bounds,
    LinearConstraint,
    milp,
)
from scipy.sparse import (  # type: ignore[import-untyped]
    coo_array,
    csr_array,
    hstack,
    kron,
    vstack,
)

from policies.moa import span

Array: TypeAlias = NDArray[np.float64]
Choice: TypeAlias = NDArray[np.int64]
Rule = tuple[float, float]

_RULES_A_LAYER = 2
_BETAS = 9
_LEAST_SHARE = 0.9
_GAP = 1e-3
_SECONDS = 30.0


def candidate_rules(lengths: Sequence[int], longest: int) -> list[Rule]:
    """Return ``(alpha, beta)`` of all rules worth a look, in tokens.

    As in the authors' code: alphas from minus the shortest length to the longest, nine
    betas from 0 to 1, and no rule that asks for more than all tokens at the longest
    length, or for none at the shortest. Of rules that keep the same at every length one
    is enough.

    Args:
        lengths: What influence was measured at, ascending.
        longest: The longest length that the plan is made for.
    """
    step = lengths[0] // 2
    alphas = range(-lengths[0], lengths[-1] + 1, step)
    betas = [number / (_BETAS - 1) for number in range(_BETAS)]
    every = [*lengths, longest]
    rules: dict[tuple[int, ...], Rule] = {}
    for alpha, beta in itertools.product(alphas, betas):
        too_much = any(alpha + beta * n > n for n in (lengths[-1], longest))
        if too_much or alpha + beta * lengths[0] <= 0:
            continue
        kept = tuple(span(alpha, beta, length) for length in every)
        rules.setdefault(kept, (float(alpha), beta))
    return list(rules.values())


def densities(rules: Sequence[Rule], lengths: Sequence[int]) -> Array:
    """Return the share of tokens that each rule keeps, ``[lengths, rules]``."""
    return np.array([[span(*rule, n) / n for rule in rules] for n in lengths])


def rule_losses(curves: Array, rules: Sequence[Rule], length: int, block: int) -> Array:
    """Return what each rule costs each head at one length, ``[heads, rules]``.

    Args:
        curves: Cost of a window of ``w`` blocks beside the sink block, ``[heads,
            length / block]``.
    """
    losses = np.zeros((len(curves), len(rules)))
    for number, rule in enumerate(rules):
        kept = span(*rule, length)
        if kept < length:
            losses[:, number] = curves[:, kept // block - 1]
    return losses


@dataclass(frozen=True)
class Problem:
    """What plans are chosen from.

    Attributes:
        losses: ``[lengths, layers * heads, rules]``, layer by layer.
        densities: ``[lengths + longer ones, rules]``.
        budget: Largest mean density at each of these lengths.
        num_layers: Layers of the model.
    """

    losses: Array
    densities: Array
    budget: float
    num_layers: int

    def objectives(self, choice: Choice) -> Array:
        """Add up a plan's losses at each length, ``[lengths]``."""
        heads = np.arange(len(choice))
        total: Array = self.losses[:, heads, choice].sum(axis=1)
        return total


def solve(problem: Problem, primary: int, limits: dict[int, float]) -> Choice | None:
    """Return the rule of each head that costs the least at one length.

    Args:
        primary: Index of the length whose loss is minimised.
        limits: Largest loss at others.

    Returns:
        Indices of rules, ``[layers * heads]``; ``None`` if no plan is within limits.
    """
    _, heads, rules = problem.losses.shape
    scale = 1 / max(float(problem.losses.max()), 1e-30)
    used = problem.num_layers * rules
    result = milp(
        np.append(scale * problem.losses[primary].ravel(), np.zeros(used)),
        integrality=np.ones(heads * rules + used),
        bounds=Bounds(0, 1),
        constraints=[
            *_shape_constraints(heads, rules, problem.num_layers),
            *_limits(problem, scale, limits),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    choice: Choice = result.x[: heads * rules].reshape(heads, rules).argmax(axis=1)
    return choice


def _shape_constraints(heads: int, rules: int, layers: int) -> list[LinearConstraint]:
    """One rule a head, and only rules that the head's layer uses, two at most.

    Variables are ``x[head, rule]``, then ``used[layer, rule]``, each 0 or 1.
    """
    ones = np.ones((1, rules))
    no_rules = csr_array((heads, layers * rules))
    one_each = hstack([kron(np.eye(heads), ones), no_rules])
    owner = np.arange(heads * rules) // (heads // layers * rules) * rules
    columns = owner + np.arange(heads * rules) % rules
    rows = np.arange(heads * rules)
    own = coo_array((-np.ones(heads * rules), (rows, columns)))
    own.resize((heads * rules, layers * rules))
    in_use = hstack([kron(np.eye(heads * rules, dtype=np.int8), 1.0), own])
    few = hstack([csr_array((layers, heads * rules)), kron(np.eye(layers), ones)])
    return [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(in_use, -np.inf, 0),
        LinearConstraint(few, 0, _RULES_A_LAYER),
    ]


def _limits(
    problem: Problem, scale: float, limits: dict[int, float]
) -> list[LinearConstraint]:
    """Keep densities within the budget, and the losses of other lengths in bounds."""
    _, heads, rules = problem.losses.shape
    used = np.zeros(problem.num_layers * rules)
    rows = [np.append(np.tile(row, heads) / heads, used) for row in problem.densities]
    dense = LinearConstraint(
        vstack([csr_array(row[None]) for row in rows]),
        _LEAST_SHARE * problem.budget,
        problem.budget,
    )
    return [dense] + [
        LinearConstraint(
            np.append(scale * problem.losses[other].ravel(), used)[None],
            -np.inf,
            scale * limit,
        )
        for other, limit in limits.items()
    ]


def pareto_plans(
    problem: Problem, intervals: int, step: Callable[[], object]
) -> list[Choice]:
    """Return plans of which none is better than another at all lengths.

    The epsilon constraint method: each length's loss is minimised in turn, with the
    others held below the upper ends of the intervals that their ranges are cut into.

    Args:
        step: Called after each of ``num_solves`` programs.
    """
    lengths = len(problem.losses)
    best = []
    for primary in range(lengths):
        best.append(solve(problem, primary, {}))
        step()
    found = [choice for choice in best if choice is not None]
    if not found:
        return []
    table = np.array([problem.objectives(choice) for choice in found])
    low, high = table.min(axis=0), table.max(axis=0)
    steps = [np.linspace(low[n], high[n], intervals + 1)[1:] for n in range(lengths)]
    for primary in range(lengths):
        others = [n for n in range(lengths) if n != primary]
        for ends in itertools.product(*(steps[other] for other in others)):
            limits = dict(zip(others, ends, strict=True))
            if others and (choice := solve(problem, primary, limits)) is not None:
                found.append(choice)
            step()
    return undominated(problem, found)


def num_solves(lengths: int, intervals: int) -> int:
    """How many programs ``pareto_plans`` solves."""
    return lengths + lengths * int(intervals ** (lengths - 1))


def undominated(problem: Problem, plans: Sequence[Choice]) -> list[Choice]:
    """Leave out plans that another one beats, or equals, at every length."""
    kept: list[tuple[Choice, Array]] = []
    costs = [(choice, problem.objectives(choice)) for choice in plans]
    for choice, cost in sorted(costs, key=lambda pair: tuple(pair[1])):
        if not any((other <= cost).all() for _, other in kept):
            kept.append((choice, cost))
    return [choice for choice, _ in kept]
