# SPDX-License-Identifier: Apache-2.0
"""Loads as flags name them: requests that come by themselves, or agents that talk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from kvserve.bench import agents_result
from kvserve.bench import result as request_result
from kvserve.bench.agents import Agent, AgentLoad, agents_in
from kvserve.bench.scrape import Sample
from kvserve.bench.workloads import (
    WORKLOADS,
    Entry,
    Request,
    draw_workload,
    read_lines,
    requests_in,
)
from kvserve.errors import UserError

AGENTS = "agents"
_OF_AGENTS = ("agents", "turns", "shared_tokens", "think")
_OF_REQUESTS = ("requests", "rate", "concurrency")
_ALL_AT_ONCE = float("inf")


class Load(Protocol):
    """What is sent to every server alike, and what comes of it."""

    @property
    def entries(self) -> Sequence[Entry]:
        """What a file of it has a line for."""

    @property
    def shown(self) -> ModuleType:
        """Whose ``table`` and ``draw`` show what policies did."""

    @property
    def warm_up(self) -> Request:
        """A request of the load's length that no prefix cache knows."""

    def send(self, base_url: str, model: str) -> Any:
        """Put a server under the load; return what the client measured."""

    def result(self, policy: str, measured: Any, timeline: list[Sample]) -> Any:
        """Say what one policy did."""

    def title(self, results: Sequence[Any]) -> str:
        """Say what was asked of every server."""


@dataclass(frozen=True)
class Requests:
    """Requests of which none waits for another's reply."""

    name: str
    entries: Sequence[Request]
    seed: int
    rate: float
    concurrency: int | None

    @property
    def shown(self) -> ModuleType:
        return request_result

    @property
    def warm_up(self) -> Request:
        return _warm(self.entries[0])

    def send(self, base_url: str, model: str) -> dict[str, Any]:
        from kvserve.bench.client import send

        return send(
            base_url,
            model,
            self.entries,
            seed=self.seed,
            rate=self.rate,
            concurrency=self.concurrency,
        )

    def result(
        self, policy: str, measured: dict[str, Any], timeline: list[Sample]
    ) -> request_result.Result:
        return request_result.Result.from_run(policy, measured, timeline)

    def title(self, results: Sequence[request_result.Result]) -> str:
        first = results[0]
        count = first.completed or 1
        return (
            f"{self.name}: {count} requests of {first.prompt_tokens / count:.0f} + "
            f"{first.output_tokens / count:.0f} tokens"
        )


@dataclass(frozen=True)
class Conversations:
    """Agents that talk beside each other."""

    name: str
    entries: Sequence[Agent]

    @property
    def shown(self) -> ModuleType:
        return agents_result

    @property
    def warm_up(self) -> Request:
        first = self.entries[0]
        asked = {"role": "user", "content": first.system + first.turns[0].user}
        return _warm(Request((asked,), first.turns[0].output_tokens))

    def send(self, base_url: str, model: str) -> Any:
        from kvserve.bench.conversations import talk

        return talk(base_url, model, self.entries)

    def result(
        self, policy: str, measured: Any, timeline: list[Sample]
    ) -> agents_result.AgentsResult:
        said, seconds = measured
        return agents_result.AgentsResult(policy, seconds, timeline, said)

    def title(self, results: Sequence[agents_result.AgentsResult]) -> str:
        return agents_result.title_of(results, self.name, len(self.entries))


def _warm(request: Request) -> Request:
    first, *rest = request.messages
    first = {**first, "content": f"Warming up. {first['content']}"}
    return replace(request, messages=(first, *rest), output_tokens=8)


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a load is, and how it arrives."""
    group = parser.add_argument_group("load")
    kinds = "; ".join(
        f"{name}: {kind.about}, {kind.prompt_tokens} + {kind.output_tokens} tokens"
        for name, kind in WORKLOADS.items()
    )
    group.add_argument(
        "--workload",
        default="chat",
        metavar="NAME|FILE.jsonl",
        help=f"{kinds}; {AGENTS}: conversations that grow turn by turn behind one "
        "system prompt; or a file (default: %(default)s)",
    )
    group.add_argument(
        "--requests", type=int, help="how many (default: 16, or all of a file)"
    )
    group.add_argument(
        "--prompt-tokens", type=int, help="mean length of a prompt, or of a new turn"
    )
    group.add_argument(
        "--output-tokens",
        type=int,
        help="mean length of a reply; of a file's and of agents: exact",
    )
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--rate",
        type=float,
        help="requests a second, as a Poisson process (default: all at once)",
    )
    group.add_argument(
        "--concurrency", type=int, help="most requests in flight (default: no limit)"
    )
    one = AgentLoad()
    group = parser.add_argument_group(f"--workload {AGENTS}")
    group.add_argument("--agents", type=int, help=f"how many (default: {one.agents})")
    group.add_argument("--turns", type=int, help=f"of each (default: {one.turns})")
    group.add_argument(
        "--shared-tokens",
        type=int,
        help=f"of the system prompt that all share (default: {one.shared}); a turn "
        f"adds --prompt-tokens ({one.new}), and gets --output-tokens ({one.reply})",
    )
    group.add_argument(
        "--think",
        type=float,
        help="mean seconds from a reply to the next turn, exponentially distributed "
        f"(default: {one.think:g})",
    )


def load_of(args: argparse.Namespace) -> Load:
    """Make the load that flags name.

    Raises:
        UserError: a flag, or a line of a file, that cannot be.
    """
    for name in (*_OF_AGENTS, *_OF_REQUESTS, "prompt_tokens", "output_tokens"):
        value = getattr(args, name)
        least = value == 0 and name == "think"
        if value is not None and not (value > 0 or least):
            raise UserError(f"--{_flag(name)} {value}: must be above 0")
    if args.workload == AGENTS:
        _refuse(args, _OF_REQUESTS, f"--workload {AGENTS} has turns, which follow")
        return Conversations(AGENTS, _agents(args).draw(args.seed))
    _refuse(args, _OF_AGENTS, f"is of --workload {AGENTS} alone")
    if args.workload in WORKLOADS:
        lengths = args.prompt_tokens, args.output_tokens
        drawn = draw_workload(args.workload, args.requests or 16, args.seed, *lengths)
        return _requests(args, args.workload, drawn)
    return _from_file(args)


def _agents(args: argparse.Namespace) -> AgentLoad:
    said = {
        "agents": args.agents,
        "turns": args.turns,
        "shared": args.shared_tokens,
        "new": args.prompt_tokens,
        "reply": args.output_tokens,
        "think": args.think,
    }
    return AgentLoad(**{key: one for key, one in said.items() if one is not None})


def _from_file(args: argparse.Namespace) -> Load:
    if args.prompt_tokens:
        raise UserError("--prompt-tokens: a workload file has prompts of its own")
    path = Path(args.workload)
    if not path.suffix:
        names = ", ".join([*WORKLOADS, AGENTS])
        raise UserError(f"--workload {args.workload}: choose one of {names}, or a file")
    lines = read_lines(path)
    agents = agents_in(lines, args.output_tokens)
    if agents is not None:
        _refuse(args, _OF_REQUESTS, f"--workload {path} has turns, which follow")
        return Conversations(path.name, agents)
    requests = requests_in(lines, args.output_tokens)
    if args.requests and args.requests > len(requests):
        raise UserError(
            f"--requests {args.requests}: --workload {path} has {len(requests)}"
        )
    return _requests(args, path.name, requests[: args.requests])


def _requests(
    args: argparse.Namespace, name: str, requests: Sequence[Request]
) -> Requests:
    rate = _ALL_AT_ONCE if args.rate is None else args.rate
    return Requests(name, requests, args.seed, rate, args.concurrency)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{_flag(name)}: {why}; leave it out")


def _flag(name: str) -> str:
    return name.replace("_", "-")
