# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens a second, side by side with stock vLLM and with the weights alone.

python -m benchmarks.prefill --engines weights none full retrieval --lengths 6000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from benchmarks.engines import STOCK, WEIGHTS, add_engine_arguments, start_engines
from benchmarks.figures import draw_curves
from benchmarks.tables import OUT, Report, Spread, Table, median_ratio

ENGINES = (WEIGHTS, STOCK, "full", "retrieval", "moa", "sink-recent", "snapkv")


def main() -> None:
    """Measure every length in turns and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser, ENGINES)
    lengths = [1024, 2048, 4096, 6000, 8000]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    longest = max(args.lengths)
    engines = start_engines(args, 1, longest, longest + 64)
    report, columns = Report("prefill"), ["engine", "tokens", "tokens/s", "speed"]
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in args.engines}
    for length in tqdm(args.lengths):
        times: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for seed in range(args.rounds + 1):
            for engine in engines:
                seconds = engine.prefill(length, seed)
                if seed:  # the first warms up
                    times[engine.name].append(seconds)
        table = Table(f"Prefill of {length} tokens", columns)
        base = times[STOCK if STOCK in times else engines[0].name]
        for name, seconds_of in times.items():
            rates = [length / seconds for seconds in seconds_of]
            curves[name][length] = rates
            speed = f"{1 / median_ratio(seconds_of, base):.2f}"
            shown = Spread.of(rates).shown(digits=0)
            table.rows.append([name, str(length), shown, speed])
        report.tables.append(table)
        report.numbers[str(length)] = times
    report.write(args.out)
    picture = args.out / "prefill.png"
    draw_curves(curves, picture, "prefill", "tokens of the prompt", "tokens a second")


if __name__ == "__main__":
    main()
