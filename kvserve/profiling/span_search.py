# SPDX-License-Identifier: Apache-2.0
"""The three steps from a model to plans of spans (MoA, arXiv 2406.14909, section 4).

Measure what each window of each head would cost, at several lengths
(``influence.py``); choose rules that cost the least at all of them together
(``elastic.py``); see how far each plan that is left is from the dense model, on longer
prompts than any that was measured (``spans.py``, ``answers.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.errors import UserError
from kvserve.profiling.answers import answer_log_probs, divergence
from kvserve.profiling.elastic import (
    Choice,
    Problem,
    Rule,
    candidate_rules,
    densities,
    num_solves,
    pareto_plans,
    rule_losses,
)
from kvserve.profiling.influence import (
    BLOCK,
    InfluenceProbe,
    Measure,
    measure_influence,
)
from kvserve.profiling.recital import Recital, build_recital
from kvserve.profiling.runs import (
    appending,
    at_least_one,
    finished,
    load_model,
    store_path,
)
from kvserve.profiling.spans import SpanAttention
from kvserve.texts.families import PROFILING
from policies.moa import span

_FACTS = 8


@dataclass(frozen=True)
class MoASettings:
    """How much to measure.

    The paper takes 50 prompts at each of 2k, 4k and 8k tokens and validates at 12k.

    Attributes:
        lengths: Tokens of the prompts, replies included, ascending.
        items: Prompts at each length.
        budgets: Largest share of the cache that a plan may keep; a plan for each.
        intervals: Parts that the range of a length's loss is cut into.
        validation_length: Tokens of the prompts that plans are compared on.
        validation_items: How many of them.
        measure: ``joint`` or ``entries``; ``influence.py`` has both.
        seed: Draws the facts, the passages they hide in and the replies.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    items: int = 8
    budgets: tuple[float, ...] = (0.25, 0.5)
    intervals: int = 4
    validation_length: int = 6144
    validation_items: int = 2
    measure: Measure = "joint"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "items", "intervals", "validation_items")
        if self.measure not in get_args(Measure):
            known = " or ".join(get_args(Measure))
            raise UserError(f"--measure {self.measure}: must be {known}")
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise UserError(f"--budgets {budget}: must be between 0 and 1")
        self._check_lengths()

    def _check_lengths(self) -> None:
        given = " ".join(map(str, self.lengths))
        if sorted(set(self.lengths)) != list(self.lengths):
            raise UserError(f"--lengths {given}: must ascend")
        if self.lengths[0] < 512 or any(length % BLOCK for length in self.lengths):
            raise UserError(
                f"--lengths {given}: must be multiples of {BLOCK}, and at least 512"
            )
        if self.validation_length < self.lengths[-1]:
            raise UserError(
                f"--validation-length {self.validation_length}: must be no shorter "
                f"than the longest of --lengths, {self.lengths[-1]}"
            )


@dataclass(frozen=True)
class Plan:
    """Rules of all heads, ``[R][H_kv]``, and how the choice was made."""

    budget: float
    rules: list[list[Rule]]
    loss: dict[int, float]
    density: dict[int, float]

    def spans(self, length: int) -> list[list[int]]:
        """Tokens that each head keeps of a request of ``length``."""
        return [[span(*rule, length) for rule in layer] for layer in self.rules]

    def to_record(self, validation: float) -> dict[str, Any]:
        """Lay the plan out as it is written to the file."""
        return {
            "budget": self.budget,
            "alphas": [[alpha for alpha, _ in layer] for layer in self.rules],
            "betas": [[beta for _, beta in layer] for layer in self.rules],
            "density": self.density,
            "loss": self.loss,
            "validation": round(validation, 5),
        }


class SpanSearch:
    """One run: a model, what to measure, and what is already measured."""

    def __init__(
        self, model_dir: str, settings: MoASettings, text: str, progress: bool
    ) -> None:
        self.settings, self.text, self.progress = settings, text, progress
        needed = {
            "--lengths": settings.lengths[-1],
            "--validation-length": settings.validation_length,
        }
        self.model, self.tokenizer = load_model(model_dir, needed)
        self.config = self.model.config.get_text_config()
        asked = ("moa", _FACTS, settings.seed, settings.measure)
        self.store = store_path(model_dir, asked, text)
        self._dense: dict[int, Tensor] = {}

    def influence(self) -> dict[int, Tensor]:
        """Return the mean cost of windows, ``[R, H_kv, blocks]``, for each length."""
        settings = self.settings
        done = finished(self.store, _read_curve)
        probe = InfluenceProbe(settings.measure)
        probe.attach(self.model)
        work = [(n, item) for n in settings.lengths for item in range(settings.items)]
        totals: dict[int, Tensor] = {}
        with appending(self.store) as write:
            for length, item in self._bar(work, "influence", "prompt"):
                key = f"influence {length} {item}"
                if key not in done:
                    recital = self._recital(length, f"{length}/{item}")
                    seed = settings.seed + item
                    found = measure_influence(self.model, probe, recital, seed)
                    # All that is kept is what the file keeps: a run that was stopped
                    # must end as one that was not.
                    line = json.dumps([key, _short(found)])
                    write(line)
                    done[key] = _read_curve(line)[1]
                totals[length] = totals.get(length, 0) + done[key] / settings.items
        return totals

    def plans(self, curves: dict[int, Tensor]) -> list[Plan]:
        """Return the plans of each budget that no other one beats at every length."""
        settings = self.settings
        lengths = [*settings.lengths, settings.validation_length]
        rules = candidate_rules(settings.lengths, settings.validation_length)
        losses = [
            rule_losses(curve.flatten(0, 1).numpy(), rules, length, BLOCK)
            for length, curve in curves.items()
        ]
        each = num_solves(len(losses), settings.intervals)
        plans = []
        with self._bar(range(each * len(settings.budgets)), "plans", "program") as bar:
            for budget in settings.budgets:
                problem = Problem(
                    np.stack(losses),
                    densities(rules, lengths),
                    budget,
                    self.config.num_hidden_layers,
                )
                found = pareto_plans(problem, settings.intervals, bar.update)
                if not found:
                    raise UserError(
                        f"--budgets {budget}: no plan keeps that little of "
                        f"{settings.lengths[0]} tokens; give more, or longer --lengths"
                    )
                plans += [self._plan(problem, choice, rules) for choice in found]
        return plans

    def validate(self, plans: list[Plan]) -> list[float]:
        """Return each plan's mean KL divergence from the dense model, in nats."""
        settings = self.settings
        done = finished(self.store, _read_number)
        attention = SpanAttention()
        attention.attach(self.model)
        work = [
            (item, plan.spans(settings.validation_length))
            for item in range(settings.validation_items)
            for plan in plans
        ]
        distances: list[float] = []
        with appending(self.store) as write:
            for item, spans in self._bar(work, "validation", "prompt"):
                key = f"validation {settings.validation_length} {item} {spans}"
                if key not in done:
                    done[key] = self._distance(attention, item, spans)
                    write(json.dumps([key, done[key]]))
                distances.append(done[key])
        by_item = np.array(distances).reshape(-1, len(plans))
        return [float(mean) for mean in by_item.mean(axis=0)]

    @torch.no_grad()
    def _distance(
        self, attention: SpanAttention, item: int, spans: list[list[int]]
    ) -> float:
        """KL divergence of one prompt's answers from the dense model's."""
        length = self.settings.validation_length
        recital = self._recital(length, f"validation/{item}")
        if item not in self._dense:
            attention.spans = None
            self._dense = {item: answer_log_probs(self.model, recital)}
        attention.spans = spans
        found = answer_log_probs(self.model, recital)
        return float(divergence(self._dense[item], found))

    def _plan(self, problem: Problem, choice: Choice, rules: list[Rule]) -> Plan:
        heads, settings = self.config.num_key_value_heads, self.settings
        chosen = [rules[number] for number in choice]
        losses = problem.objectives(choice).tolist()
        shares = problem.densities[:, choice].mean(axis=1).tolist()
        lengths = [*settings.lengths, settings.validation_length]
        return Plan(
            problem.budget,
            [chosen[first : first + heads] for first in range(0, len(chosen), heads)],
            dict(zip(settings.lengths, map(_digits, losses), strict=True)),
            {n: round(share, 4) for n, share in zip(lengths, shares, strict=True)},
        )

    def _recital(self, length: int, seed: str) -> Recital:
        """A prompt and its reply of exactly ``length`` tokens; newlines fill it up."""
        seed = f"moa/{self.settings.seed}/{seed}"
        try:
            recital = build_recital(
                self.tokenizer, PROFILING, length, _FACTS, seed, self.text
            )
        except UserError as error:
            raise UserError(f"--lengths {length}: {error}; give longer ones") from None
        token_ids = recital.token_ids
        missing = length - len(token_ids)
        return Recital(token_ids + token_ids[-1:] * missing, recital.answers)

    def _bar(self, work: Any, name: str, unit: str) -> Any:
        return tqdm(work, desc=name, unit=unit, disable=not self.progress)

    def memory(self) -> int:
        """Bytes that the longest backward pass takes besides the model, about."""
        config, tokens = self.config, self.settings.lengths[-1]
        hidden = config.num_hidden_layers * config.hidden_size
        layer = 6 * config.intermediate_size + 12 * config.hidden_size
        tile = 8 * 512
        return int(4 * tokens * (hidden + layer + tile))


def _digits(cost: float) -> float:
    """Four significant digits."""
    return float(f"{cost:.4g}")


def _short(curves: Tensor) -> list[Any]:
    return [[list(map(_digits, head)) for head in layer] for layer in curves.tolist()]


def _read_curve(line: str) -> tuple[str, Tensor]:
    key, curves = json.loads(line)
    return key, torch.tensor(curves)


def _read_number(line: str) -> tuple[str, float]:
    key, number = json.loads(line)
    return key, float(number)
