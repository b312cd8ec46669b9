# SPDX-License-Identifier: Apache-2.0
"""What a run of agents measured, and how several are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvserve.bench.conversations import Said
from kvserve.bench.result import Run, draw_timelines, first_error, save_figure


@dataclass(frozen=True)
class AgentsResult(Run):
    """One policy under the turns of all agents.

    Attributes:
        said: every turn that was sent, in the order in which replies ended. The seconds
            of the run have the thinking between them.
    """

    said: list[Said]

    @property
    def whole(self) -> list[Said]:
        """Turns that were answered in full; only they count."""
        return [one for one in self.said if not one.error]

    @property
    def failed(self) -> int:
        return len(self.said) - len(self.whole)

    @property
    def first_error(self) -> str:
        return first_error([one.error for one in self.said])

    @property
    def turns_per_minute(self) -> float:
        return 60 * len(self.whole) / self.seconds

    def ttft(self, percent: float, turn: int | None = None) -> float:
        """A percentile of the seconds to the first token, of one turn or of all."""
        found = [one.ttft for one in self.whole if turn in (None, one.turn)]
        return float(np.percentile(found or [0.0], percent))

    @property
    def turns(self) -> int:
        return max((one.turn for one in self.said), default=-1) + 1

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that the server found in its prefix cache."""
        first, last = self.timeline[0], self.timeline[-1]
        asked = last.prefix_queries - first.prefix_queries
        return (last.prefix_hits - first.prefix_hits) / asked if asked else 0.0

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "turns_per_minute": self.turns_per_minute,
            "ttft_p50_by_turn": [self.ttft(50, turn) for turn in range(self.turns)],
            "prefix_hit_rate": self.hit_rate,
        }


def title_of(results: Sequence[AgentsResult], name: str, agents: int) -> str:
    """Say what was asked of every server."""
    whole = results[0].whole
    longest = max((one.prompt_tokens + one.output_tokens for one in whole), default=0)
    turns = results[0].turns
    return f"{name}: {agents} agents of {turns} turns, up to {longest} tokens"


def table(results: Sequence[AgentsResult]) -> str:
    """Two tables of Markdown, a row a policy; speed is relative to the first row."""
    lines = [
        "| policy | turns/min | speed | TTFT p50 s | of first | p90 | prefix hits "
        "| most running | peak KV | preempted | failed |",
        "|---" * 11 + "|",
    ]
    first = results[0]
    for one in results:
        cells = [
            one.policy,
            f"{one.turns_per_minute:.1f}",
            f"{one.turns_per_minute / (first.turns_per_minute or 1):.2f}",
            f"{one.ttft(50):.2f}",
            f"{one.ttft(50) / (first.ttft(50) or 1):.2f}",
            f"{one.ttft(90):.2f}",
            f"{one.hit_rate:.0%}",
            f"{one.most_running}",
            f"{one.peak_usage:.0%}",
            f"{one.preemptions}",
            f"{one.failed}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    turns = range(max(one.turns for one in results))
    lines += ["", "TTFT p50 by turn, s:", ""]
    lines.append("| policy | " + " | ".join(str(turn + 1) for turn in turns) + " |")
    lines.append("|---" * (len(turns) + 1) + "|")
    for one in results:
        cells = [one.policy, *(f"{one.ttft(50, turn):.2f}" for turn in turns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, title: str, results: Sequence[AgentsResult]) -> None:
    """Draw requests running and KV held over time, turns a minute and TTFT by turn."""
    figure, axes, colours = draw_timelines(title, results)
    names = [one.policy for one in results]
    rates = [one.turns_per_minute for one in results]
    axes[0, 1].bar(names, rates, color=colours)
    axes[0, 1].set(ylabel="turns a minute")
    for one, colour in zip(results, colours, strict=True):
        numbers = range(1, one.turns + 1)
        times = [one.ttft(50, number - 1) for number in numbers]
        axes[1, 1].plot(numbers, times, marker="o", color=colour)
    axes[1, 1].set(ylabel="TTFT p50, s", xlabel="turn", ylim=(0, None))
    save_figure(figure, path)
