# SPDX-License-Identifier: Apache-2.0
"""Finds the least budget of a policy that keeps enough of the full score."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from policies.budgets import Arguments, PolicySpec

STEPS = 50
"""Budgets are tried in steps of a fiftieth of the full cache."""


@dataclass(frozen=True)
class Probe:
    """A budget that was tried.

    Attributes:
        of_full: ratio of the score to the full cache's.
        held: KV memory held, as a share of the full cache.
    """

    share: float
    of_full: float
    held: float


Measure = Callable[[float], Probe | None]


def find_budget(target: float, measure: Measure) -> tuple[Probe | None, list[Probe]]:
    """Bisect budgets to the least one whose score is ``target`` of the full score.

    A policy's score is taken to rise with its budget. It need not, in detail: what is
    found holds the target, and the next smaller budget that was tried does not.

    Args:
        measure: tries a share of the KV cache; ``None`` is one too small for the
            policy.

    Returns:
        The probe of the least memory that holds the target, ``None`` if only the full
        cache does; and all probes in the order they were made.
    """
    probes: list[Probe] = []
    missed, held = 0, STEPS
    while held - missed > 1:
        middle = (missed + held) // 2
        probe = measure(middle / STEPS)
        if probe is not None:
            probes.append(probe)
        if probe is not None and probe.of_full >= target:
            held = middle
        else:
            missed = middle
    good = [probe for probe in probes if probe.of_full >= target]
    return min(good, key=lambda probe: probe.held, default=None), probes


def serve_command(
    model: str | None, spec: PolicySpec, arguments: Arguments, length: int
) -> str:
    """The command that serves a model under a policy with these parameters."""
    words = ["kvserve", "serve", *([model] if model else []), "--policy", spec.name]
    for key, value in arguments.items():
        words += ["--policy-arg", f"{key}={value}"]
    return shlex.join([*words, "--max-model-len", str(length)])
