# SPDX-License-Identifier: Apache-2.0
"""Needle accuracy of kvserve's policies beside NVIDIA kvpress, at equal shares of KV.

Same model, same prompts, same scorer. kvpress runs in an environment of its own, which
``make bench-kvpress`` makes, kvserve through its engine. Both read the whole prompt,
the question at its end; kvpress's own pipeline would compress the text before it sees
the question. ``RULES`` says how a policy gets its share; all else is as a policy or a
press ships it, but for what ``NAME:{json}`` sets. In brackets, the share of KV entries
that were in fact held when the prompt had been read.

Prints Markdown. With ``--out`` finished cells are kept, and not measured again:

    python -m benchmarks.quality_vs_kvpress --out quality.json --needles 8 \\
      --shares 0.5 0.25 --policies full snapkv 'snapkv:{"window":64}' \\
      --presses none SnapKVPress
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.needles import (
    LENGTHS,
    kept_share,
    make_engine,
    mean_score,
    parse,
    prompts,
    replies,
)
from kvserve import UserError
from kvserve.evaluation.model import shape_of
from kvserve.models import resolve_model
from policies.base import ModelShape
from policies.budgets import RULES, Arguments, arguments_for
from policies.head_scores import load_head_scores

POLICIES = [
    "full",
    "sink-recent",
    "retrieval",
    "snapkv",
    'snapkv:{"window":64}',
    "h2o",
    'h2o:{"norm":"count"}',
    "heterogeneous",
    'heterogeneous:{"beta":0.34,"m":1,"recent":64}',
    "moa",
    "sharded",
]
GATED = "DuoAttentionPress, our gates"
PRESSES = [
    "none",
    "StreamingLLMPress",
    "SnapKVPress",
    'SnapKVPress:{"window_size":32}',
    "AdaKVPress(SnapKVPress)",
    "ObservedAttentionPress",
    "DuoAttentionPress",
    GATED,
]
_CONTROLS = {"none", "full"}


class Results:
    """Finished cells, in a file if there is one."""

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        self.path, self.conditions = path, conditions
        self.cells: dict[str, dict[str, Any]] = {}
        if path and path.exists():
            saved = json.loads(path.read_text())
            if saved["conditions"] != conditions:
                raise SystemExit(f"--out {path}: of other conditions; name a new file")
            self.cells = {key(cell): cell for cell in saved["cells"]}

    def add(self, cell: dict[str, Any], result: dict[str, Any]) -> None:
        """Record a cell; one that was refused is tried again next time."""
        self.cells[key(cell)] = cell | result
        done = [cell for cell in self.cells.values() if "refused" not in cell]
        if self.path:
            saved = {"conditions": self.conditions, "cells": done}
            self.path.write_text(json.dumps(saved, indent=1) + "\n")


def key(cell: dict[str, Any]) -> str:
    """What makes a cell what it is."""
    fields = ("side", "method", "share", "length", "arguments")
    return json.dumps([cell[field] for field in fields])


def plan_cells(args: argparse.Namespace, shape: ModelShape) -> list[dict[str, Any]]:
    """List every cell that was asked for."""
    methods = [("kvpress", method) for method in args.presses]
    methods += [("kvserve", method) for method in args.policies]
    cells = []
    for side, method in methods:
        for share in [1.0] if method in _CONTROLS else args.shares:
            for length in args.lengths:
                try:
                    arguments = arguments_of(side, method, share, length, shape)
                except UserError as error:
                    print(f"{method}: {error}", file=sys.stderr)
                    continue
                cells.append(
                    {
                        "side": side,
                        "method": method,
                        "share": share,
                        "length": length,
                        "arguments": arguments,
                    }
                )
    return cells


def arguments_of(
    side: str, method: str, share: float, length: int, shape: ModelShape
) -> Arguments:
    """Parameters of a method; presses other than the gated one take the share as is."""
    name, own = parse(method)
    if method == GATED:
        name = "retrieval"
    elif side == "kvpress":
        return own
    return arguments_for(name, share, length, shape) | own


class Runner:
    """Measures cells, each side with the same prompts."""

    def __init__(
        self, args: argparse.Namespace, shape: ModelShape, results: Results
    ) -> None:
        self.args, self.shape, self.results = args, shape, results
        self.model = resolve_model(args.model)
        self.needles = {
            length: prompts(self.model, "numbers", length, args.needles)
            for length in args.lengths
        }

    def kvpress(self, cells: list[dict[str, Any]]) -> Iterable[None]:
        """Measure in a process of kvpress's own environment."""
        if not cells:
            return
        job = {
            "model": self.model,
            "dtype": self.args.dtype,
            "output": self.args.output,
            "cells": cells,
            "prompts": {
                length: [needle.token_ids for needle in needles]
                for length, needles in self.needles.items()
            },
        }
        if any(cell["method"] == GATED for cell in cells):
            job["gates"] = load_head_scores(None, self.shape)
        script = Path(__file__).with_name("kvpress_needles.py")
        with subprocess.Popen(
            [self.args.kvpress_python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin
            assert child.stdout
            json.dump(job, child.stdin)
            child.stdin.close()
            for cell, line in zip(cells, child.stdout, strict=False):
                self._record(cell, json.loads(line))
                yield
        if child.returncode:
            raise SystemExit(f"kvpress failed ({child.returncode}); see above")

    def kvserve(self, cells: list[dict[str, Any]]) -> Iterable[None]:
        """Measure through the engine, one engine for all cells that can share it."""
        engines: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            policy, _ = parse(cell["method"])
            same = json.dumps([policy, cell["arguments"]])
            engines.setdefault(same, []).append(cell)
        for same, group in engines.items():
            policy, arguments = json.loads(same)
            longest = max(self.args.lengths)
            try:
                llm = make_engine(
                    self.model, policy, arguments, longest, self.args.dtype
                )
            except UserError as error:
                print(error, file=sys.stderr)
                llm = None
            for cell in group:
                self._record(cell, self._engine_cell(llm, cell["length"]))
                yield
            del llm
            gc.collect()

    def _engine_cell(self, llm: Any, length: int) -> dict[str, Any]:
        if llm is None:
            return {"refused": "refused"}
        output = self.args.output
        return {
            "kept": kept_share(llm, length, output),
            "replies": replies(llm, self.needles[length], output),
        }

    def _record(self, cell: dict[str, Any], result: dict[str, Any]) -> None:
        if "replies" in result:
            needles = self.needles[cell["length"]]
            result["score"] = mean_score(needles, result["replies"])
        self.results.add(cell, result)


def describe(cell: dict[str, Any]) -> str:
    """Settings of a row, beyond what its method's name says."""
    if cell["method"] == GATED:
        return "gates, heads and windows of `retrieval`, sdpa attention"
    if cell["side"] == "kvpress":
        return str(cell.get("settings", ""))
    return RULES[parse(cell["method"])[0]]


def table(cells: list[dict[str, Any]], lengths: list[int]) -> str:
    """Lay cells out in Markdown: a row for each share and method."""
    rows: dict[tuple[float, str, str], dict[int, dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: -cell["share"]):
        row = rows.setdefault((cell["share"], cell["side"], cell["method"]), {})
        row[cell["length"]] = cell
    heads = " | ".join(f"{length} tokens" for length in lengths)
    lines = [
        f"| share | engine | method | settings | {heads} |",
        "|---" * (4 + len(lengths)) + "|",
    ]
    for (share, side, method), row in rows.items():
        shown = " | ".join(
            f"{row[n]['score']:.2f} ({row[n]['kept']:.0%})"
            if "score" in row.get(n, {})
            else "refused"
            for n in lengths
        )
        settings = describe(next(iter(row.values())))
        lines.append(f"| {share:.0%} | {side} | {method} | {settings} | {shown} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--policies", nargs="*", default=POLICIES, metavar="SPEC")
    parser.add_argument("--presses", nargs="*", default=PRESSES, metavar="SPEC")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--output", type=int, default=24, help="tokens of a reply")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON of all cells, replies included")
    parser.add_argument("--kvpress-python", default=".venv-kvpress/bin/python")
    args = parser.parse_args()
    for spec in args.policies:
        if parse(spec)[0] not in RULES:
            parser.error(f"--policies {spec}: choose among {', '.join(RULES)}")
    return args


def main() -> None:
    """Measure what is missing and print the table."""
    args = parse_arguments()
    shape = shape_of(resolve_model(args.model))
    conditions = {
        "model": shape.name,
        "dtype": args.dtype,
        "needles": args.needles,
        "output": args.output,
    }
    results = Results(args.out, conditions)
    cells = plan_cells(args, shape)
    missing = [cell for cell in cells if key(cell) not in results.cells]
    runner = Runner(args, shape, results)
    with tqdm(total=len(missing), desc="cells") as progress:
        for side in (runner.kvpress, runner.kvserve):
            for _ in side([cell for cell in missing if cell["side"] == side.__name__]):
                progress.update()
    finished = [results.cells[key(cell)] for cell in cells]
    print(table(finished, args.lengths))
    for versions in {cell.get("versions") for cell in finished} - {None}:
        print(f"\nPresses: {versions}.")


if __name__ == "__main__":
    main()
