# SPDX-License-Identifier: Apache-2.0
"""What one run measured, and how several are shown: table, picture, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvserve.bench.scrape import Sample
from kvserve.errors import UserError


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of a latency, in seconds; zeros if nothing was measured."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        values = np.asarray(seconds or [0.0])
        p50, p99 = np.percentile(values, [50, 99])
        return cls(float(values.mean()), float(p50), float(p99))


@dataclass(frozen=True)
class Run:
    """A policy under some load.

    Attributes:
        seconds: until the last reply.
        timeline: the server's own gauges meanwhile.
    """

    policy: str
    seconds: float
    timeline: list[Sample]

    @property
    def most_running(self) -> int:
        return int(max(sample.running for sample in self.timeline))

    @property
    def peak_usage(self) -> float:
        return max(sample.usage for sample in self.timeline)

    @property
    def preemptions(self) -> int:
        return int(self.timeline[-1].preemptions - self.timeline[0].preemptions)

    def to_json(self) -> dict[str, Any]:
        """Everything, figures that are derived included."""
        return asdict(self) | {
            "most_running": self.most_running,
            "peak_kv_usage": self.peak_usage,
            "preemptions": self.preemptions,
        }


def first_error(errors: Sequence[str]) -> str:
    """The last line of the first error, if there is one."""
    found = [error for error in errors if error]
    return found[0].strip().splitlines()[-1] if found else ""


@dataclass(frozen=True)
class Result(Run):
    """One policy under one load.

    Attributes:
        completed: requests that were answered in full; only they count below.
        ttft: time to first token, s, from sending the request.
        itl: time between two tokens of a reply, s; tokens that came in one chunk share
            the time since the chunk before.
    """

    completed: int
    failed: int
    first_error: str
    prompt_tokens: int
    output_tokens: int
    ttft: Spread
    itl: Spread

    @classmethod
    def from_run(
        cls, policy: str, measured: dict[str, Any], timeline: list[Sample]
    ) -> Result:
        """Read the client's result (``engine.bench_client.send``).

        Latencies are those of requests that were answered in full. One that failed has
        no output, but times of what came before.
        """
        whole = [at for at, tokens in enumerate(measured["output_lens"]) if tokens]
        gaps = [gap for at in whole for gap in measured["itls"][at]]
        return cls(
            policy=policy,
            seconds=measured["duration"],
            completed=measured["completed"],
            failed=measured["failed"],
            first_error=first_error(measured["errors"]),
            prompt_tokens=measured["total_input_tokens"],
            output_tokens=measured["total_output_tokens"],
            ttft=Spread.of([measured["ttfts"][at] for at in whole]),
            itl=Spread.of(gaps),
            timeline=timeline,
        )

    @property
    def requests_per_second(self) -> float:
        return self.completed / self.seconds

    @property
    def output_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "requests_per_second": self.requests_per_second,
            "output_tokens_per_second": self.output_per_second,
        }


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a policy; speed is output tok/s relative to the first row."""
    lines = [
        "| policy | requests/s | output tok/s | speed | TTFT mean s | p50 | p99 "
        "| ITL mean ms | p50 | p99 | most running | peak KV | preempted | failed |",
        "|---" * 14 + "|",
    ]
    for result in results:
        speed = result.output_per_second / (results[0].output_per_second or 1)
        cells = [
            result.policy,
            f"{result.requests_per_second:.3g}",
            f"{result.output_per_second:.1f}",
            f"{speed:.2f}",
            *(f"{value:.2f}" for value in asdict(result.ttft).values()),
            *(f"{1000 * value:.0f}" for value in asdict(result.itl).values()),
            f"{result.most_running}",
            f"{result.peak_usage:.0%}",
            f"{result.preemptions}",
            f"{result.failed}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_json(path: Path, about: dict[str, Any], results: Sequence[Run]) -> None:
    """Write the settings of the run and every result with its timeline."""
    document = about | {"runs": [result.to_json() for result in results]}
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from None


def draw(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw requests running and KV held over time, throughput and first tokens."""
    figure, axes, colours = draw_timelines(title, results)
    names = [result.policy for result in results]
    axes[0, 1].bar(names, [r.output_per_second for r in results], color=colours)
    axes[0, 1].set(ylabel="output tokens a second")
    axes[1, 1].bar(names, [r.ttft.mean for r in results], color=colours)
    axes[1, 1].set(ylabel="mean time to first token, s")
    save_figure(figure, path)


def draw_timelines(title: str, results: Sequence[Run]) -> tuple[Any, Any, list[Any]]:
    """Draw requests running and KV held over time, and leave room beside for two more.

    Returns:
        The figure, its axes ``[2, 2]``, and a colour for each result.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    figure.suptitle(title)
    colours = [pyplot.get_cmap("tab10")(index) for index in range(len(results))]
    for result, colour in zip(results, colours, strict=True):
        seconds = [sample.seconds for sample in result.timeline]
        running = [sample.running for sample in result.timeline]
        usage = [100 * sample.usage for sample in result.timeline]
        style = {"color": colour, "label": result.policy, "where": "post"}
        axes[0, 0].step(seconds, running, **style)
        axes[1, 0].step(seconds, usage, **style)
    axes[0, 0].set(ylabel="requests running", ylim=(0, None))
    axes[0, 0].legend()
    axes[1, 0].set(ylabel="KV cache held, %", ylim=(0, 105), xlabel="seconds")
    return figure, axes, colours


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of :func:`draw_timelines`, and forget it."""
    from matplotlib import pyplot

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--image {path}: {error}") from None
    finally:
        pyplot.close(figure)
