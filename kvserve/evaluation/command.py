# SPDX-License-Identifier: Apache-2.0
"""``kvserve eval``: which policy, and which budget, a model can bear."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.arguments import BOOK
from kvserve.evaluation.assignments import assignments_of, lengths_of
from kvserve.evaluation.contenders import (
    LocalEngine,
    PolicyContender,
    ServerContender,
)
from kvserve.evaluation.finder import Probe, find_budget, serve_command
from kvserve.evaluation.ladder import at_budgets, left_out, read_budgets
from kvserve.evaluation.model import EvaluatedModel, load_model
from kvserve.evaluation.report import Heading, make_tables, write_report
from kvserve.evaluation.runner import REFERENCE, Assignment, Contender, Runner
from kvserve.evaluation.store import Cell, Store
from kvserve.evaluation.summary import Line, Summary
from kvserve.evaluation.tasks import REPLY
from kvserve.profiling.fast import profile_arguments
from kvserve.texts.haystack import load_book, load_text
from kvserve.units import parse_bytes
from kvserve.version import __version__
from policies.budgets import PolicySpec


@dataclass(frozen=True)
class Work:
    """Everything that a command asks for, checked and ready to run."""

    model: EvaluatedModel
    assignments: list[Assignment]
    conditions: dict[str, Any]
    longest: int


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run ``kvserve eval``."""
    work = prepare(args)
    command = shlex.join(["kvserve", "eval", *argv])
    store: Store | None = None
    try:
        if args.find_budget is not None:
            spec = _only_policy(args, work)
            store = Store(args.out, work.conditions)
            return _find(args, work, store, command, spec)
        contenders, notes = _contenders(args, work)
        store = Store(args.out, work.conditions)
        Runner(work.assignments, store).run(contenders)
        _finish(args, work, store, command, contenders, notes)
        return 0
    except KeyboardInterrupt:
        kept = len(store.cells) if store else 0
        print(
            f"\nkvserve: stopped; {kept} finished cells are kept in {args.out}. The "
            "same command goes on.",
            file=sys.stderr,
        )
        return 130
    finally:
        if store:
            store.close()


def prepare(args: argparse.Namespace) -> Work:
    """Check what was asked for and make all prompts, before any engine starts.

    Raises:
        UserError: the first thing that is wrong.
    """
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be at least 1")
    if args.find_budget is not None and not 0 < args.find_budget <= 1:
        raise UserError(f"--find-budget {args.find_budget}: must lie in 0 to 1")
    lengths = lengths_of(args)
    text = load_text(args.haystack, "--haystack") if args.haystack else load_book(BOOK)
    model = load_model(args.model)
    for length in lengths:
        if length > model.limit:
            raise UserError(
                f"--length {length}: {model.name} reads at most {model.limit} tokens, "
                "prompt and reply together"
            )
    assignments = assignments_of(args, lengths, model.tokenizer, text)
    longest = max(
        max(sample.request.tokens for sample in assignment.samples)
        for assignment in assignments
    )
    if longest > model.limit:
        raise UserError(
            f"--task: a prompt and its reply take {longest} tokens, and {model.name} "
            f"reads at most {model.limit}"
        )
    _check_protection(args, assignments)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    haystack = args.haystack.name if args.haystack else f"{BOOK}.txt"
    conditions = {
        "model": model.name,
        "weights": model.weights,
        "dtype": args.dtype,
        "samples": args.samples,
        "seed": args.seed,
        "haystack": f"{haystack} ({digest})",
        "kvserve": __version__,
    }
    if args.kv_cache_dtype != "auto":
        conditions["kv_cache_dtype"] = args.kv_cache_dtype
    if args.reply != REPLY:
        conditions["reply"] = args.reply
    if args.protect:
        conditions["protect"] = args.protect
    return Work(model, assignments, conditions, max([longest, *lengths]))


def _check_protection(
    args: argparse.Namespace, assignments: Sequence[Assignment]
) -> None:
    """Refuse what would measure the same as without ``--protect``."""
    if not args.protect:
        return
    if args.url:
        raise UserError("--protect: a server is started with it; leave out one of both")
    samples = [sample for one in assignments for sample in one.samples]
    if not any(sample.request.system for sample in samples):
        raise UserError(
            "--protect: no prompt has a system prompt; add --task system-facts"
        )


def _engine(args: argparse.Namespace, work: Work) -> LocalEngine:
    memory = parse_bytes(args.kv_memory, "--kv-memory") if args.kv_memory else None
    return LocalEngine(
        work.model,
        args.dtype,
        work.longest,
        memory,
        args.kv_cache_dtype,
        bool(args.protect),
    )


def _contenders(
    args: argparse.Namespace, work: Work
) -> tuple[list[Contender], list[str]]:
    """Policies as they were given, the full cache first, then servers.

    Returns:
        Them, and sentences on what is not measured.
    """
    typed = dict.fromkeys(args.policy)
    policies = at_budgets(typed, read_budgets(args.budgets)) if args.budgets else typed
    if args.budgets and not typed:
        raise UserError("--budgets: whose? Give a --policy too")
    specs = [_parse(text, work) for text in policies]
    servers: list[Contender] = [
        ServerContender.parse(text, work.model, work.longest) for text in args.url
    ]
    names = [spec.text for spec in specs] + [server.name for server in servers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--url: two are called {name}; name one: --url NAME=URL")
    if REFERENCE not in names and (specs or not servers):
        specs.insert(0, PolicySpec.parse(REFERENCE))
    engine, notes = _engine(args, work), []
    local: list[Contender] = []
    for spec in specs:
        contender = PolicyContender(spec, engine)
        lengths = dict.fromkeys(one.length for one in work.assignments)
        refused = left_out(contender, lengths)
        if refused and spec.text in typed:
            raise UserError(next(iter(refused.values())))
        notes += [f"Not measured at {n} tokens: {why}." for n, why in refused.items()]
        local.append(dataclasses.replace(contender, without=frozenset(refused)))
    found = sorted([*local, *servers], key=lambda one: one.name != REFERENCE)
    return found, notes


def _parse(text: str, work: Work) -> PolicySpec:
    """Read a policy, with the profile that it needs of the model."""
    spec = PolicySpec.parse(text)
    spec.refuse_range("a range says what a server does when requests wait")
    added = profile_arguments(text, {}, work.model.path, make=True)
    return dataclasses.replace(spec, from_file=(*spec.from_file, *added.items()))


def _only_policy(args: argparse.Namespace, work: Work) -> PolicySpec:
    if len(args.policy) != 1 or args.url or args.budgets:
        raise UserError(
            "--find-budget: give exactly one --policy, and no --url or --budgets"
        )
    spec = _parse(args.policy[0], work)
    if spec.budget is not None:
        raise UserError(f"--policy {spec.text}: --find-budget sets its budget")
    if spec.rule == REFERENCE:
        raise UserError("--find-budget: `full` has no budget; choose another --policy")
    return spec


def _find(
    args: argparse.Namespace, work: Work, store: Store, command: str, spec: PolicySpec
) -> int:
    engine = _engine(args, work)
    runner = Runner(work.assignments, store)
    length = work.assignments[-1].length
    contenders: list[Contender] = [PolicyContender(PolicySpec.parse(REFERENCE), engine)]
    spec.with_share(1.0).arguments(length, engine.shape)
    runner.run(contenders)

    def measure(share: float) -> Probe | None:
        asked = spec.with_share(share)
        try:
            asked.arguments(length, engine.shape)
        except UserError:
            return None
        contenders.append(PolicyContender(asked, engine))
        runner.run(contenders[-1:])
        line = _overall(store, contenders, asked.text)
        assert line.memory is not None
        assert line.of_full is not None
        held = line.memory.held
        print(f"{asked.text}: {line.of_full:.1%} of the full score, KV {held:.1%}")
        return Probe(share, line.of_full, held)

    _overall(store, contenders, REFERENCE)
    best, _ = find_budget(args.find_budget, measure)
    _finish(args, work, store, command, contenders)
    if best is None:
        print(f"\nNo budget below the full cache keeps {args.find_budget:.1%} of it.")
        return 1
    chosen = spec.with_share(best.share)
    arguments = chosen.arguments(length, engine.shape)
    print(
        f"\n{chosen.text} keeps {best.of_full:.1%} of the full score with "
        f"{best.held:.1%} of its KV memory. Serve it:\n"
        f"  {serve_command(args.model, spec, arguments, length)}"
    )
    return 0


def _overall(store: Store, contenders: Sequence[Contender], policy: str) -> Line:
    """The mean of a policy over what the full cache can do."""
    summary = _summary(store, contenders)
    for line in summary.overall:
        if line.policy == policy:
            return line
    raise UserError(
        "--find-budget: the full cache fails all of these tasks itself; choose another "
        "--task, such as needle or agreement"
    )


def _summary(store: Store, contenders: Sequence[Contender]) -> Summary:
    return Summary(_cells(store, contenders))


def _cells(store: Store, contenders: Sequence[Contender]) -> list[Cell]:
    return [
        cell
        for contender in contenders
        for cell in store.cells.values()
        if cell.policy == contender.name
    ]


def _finish(
    args: argparse.Namespace,
    work: Work,
    store: Store,
    command: str,
    contenders: Sequence[Contender],
    notes: Sequence[str] = (),
) -> None:
    asked = {(one.task.name, one.length) for one in work.assignments}
    cells = [c for c in _cells(store, contenders) if (c.task, c.length) in asked]
    tasks = {one.task.name: one.task.what for one in work.assignments}
    heading = Heading(work.model.name, command, work.conditions, tasks, tuple(notes))
    written = write_report(cells, heading, args.out)
    for table in make_tables(Summary(cells)):
        print(f"\n{table.title}\n\n{table.markdown()}")
    for note in notes:
        print(f"\n{note}")
    print(f"\nwrote {', '.join(str(path) for path in written)}")
