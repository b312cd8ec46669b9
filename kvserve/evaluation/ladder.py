# SPDX-License-Identifier: Apache-2.0
"""The same policies at several budgets: what others publish their scores at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvserve.errors import UserError
from kvserve.evaluation.contenders import PolicyContender
from policies.budgets import PolicySpec, split_policy
from policies.shares import Budget

LADDER = ("50%", "25%", "12.5%", "6.25%")


def read_budgets(text: str) -> tuple[str, ...]:
    """Read ``--budgets``: budgets behind commas, or ``ladder`` for halves of halves.

    Raises:
        UserError: one of them is no budget.
    """
    budgets = LADDER if text == "ladder" else tuple(text.split(","))
    for budget in budgets:
        try:
            Budget.parse(budget)
        except UserError:
            raise UserError(
                f"--budgets {text}: give shares such as 50% or 0.5, or tokens such as "
                "512, behind commas, or say `ladder`"
            ) from None
    return tuple(dict.fromkeys(budgets))


def at_budgets(policies: Iterable[str], budgets: Sequence[str]) -> list[str]:
    """Every policy at every budget; one that has its own, or takes none, as it is."""
    found = []
    for text in policies:
        spec = PolicySpec.parse(text)
        if spec.budget is not None or spec.rule == "full":
            found.append(text)
            continue
        joint = "," if split_policy(text)[1] else ":"
        found += [f"{text}{joint}budget={budget}" for budget in budgets]
    return list(dict.fromkeys(found))


def left_out(contender: PolicyContender, lengths: Iterable[int]) -> dict[int, str]:
    """Lengths at which a policy cannot have its budget, and why."""
    found = {}
    for length in lengths:
        try:
            contender.arguments(length)
        except UserError as error:
            found[length] = str(error)
    return found
