# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step at growing contexts: flat where the budget is fixed.

python -m benchmarks.decode_flat --engines none full sink-recent --contexts 1024 8000
python -m benchmarks.decode_flat --engines sink-recent:budget=0.25 h2o:budget=0.25
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.engines import (
    STOCK,
    WEIGHTS,
    TimedEngine,
    add_engine_arguments,
    start_engines,
)
from benchmarks.figures import draw_curves
from benchmarks.tables import OUT, Report, Spread, Table, median_ratio

ENGINES = (WEIGHTS, STOCK, "full", "retrieval", "sink-recent:recent=480", "h2o")


def measure(
    engines: Sequence[TimedEngine], args: argparse.Namespace
) -> dict[int, dict[str, list[float]]]:
    """Seconds of a step, by context and engine; contexts take turns as engines do."""
    times: dict[int, dict[str, list[float]]] = {
        context: {engine.name: [] for engine in engines} for context in args.contexts
    }
    for seed in tqdm(range(args.rounds + 1), unit="round"):
        for context in args.contexts:
            for engine in engines:
                seconds = engine.decode(args.requests, context, args.steps, seed)
                if seed:  # the first warms up
                    times[context][engine.name].append(seconds)
    return times


def main() -> None:
    """Measure every context in turns and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser, ENGINES)
    contexts = [1024, 2048, 4096, 8000]
    parser.add_argument("--contexts", nargs="+", type=int, default=contexts)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    longest = max(args.contexts) + args.steps
    engines = start_engines(args, args.requests, longest, longest + 64)
    report = Report("decode_flat")
    columns = ["engine", "context", "step, ms", "time", "flat"]
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in args.engines}
    times = measure(engines, args)
    for context in args.contexts:
        table = Table(f"Decode step of {args.requests} x {context} tokens", columns)
        found, shortest = times[context], times[args.contexts[0]]
        base = found[STOCK if STOCK in found else engines[0].name]
        for name, seconds_of in found.items():
            curves[name][context] = [1e3 * seconds for seconds in seconds_of]
            row = [name, str(context), Spread.of(seconds_of).shown(1e3)]
            row += [f"{median_ratio(seconds_of, base):.2f}"]
            row += [f"{median_ratio(seconds_of, shortest[name]):.2f}"]
            table.rows.append(row)
        report.tables.append(table)
        report.numbers[str(context)] = found
    report.write(args.out)
    title = f"decode step of {args.requests} requests"
    picture = args.out / "decode_flat.png"
    draw_curves(curves, picture, title, "tokens of each", "milliseconds")


if __name__ == "__main__":
    main()
