# SPDX-License-Identifier: Apache-2.0
"""Loads as flags name them: requests that come by themselves, or agents that talk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from kvserve.bench import agents_result
from kvserve.bench import result as request_result
from kvserve.bench.agents import Agent, AgentLoad, read_agents, write_agents
from kvserve.bench.scrape import Sample
from kvserve.bench.workloads import (
    WORKLOADS,
    Request,
    draw_workload,
    read_workload,
    write_workload,
)
from kvserve.errors import UserError

AGENTS = "agents"
_OF_AGENTS = ("agents", "turns", "shared_tokens", "think")
_OF_REQUESTS = ("requests", "rate", "concurrency")
_ALL_AT_ONCE = float("inf")


class Load(Protocol):
    """What is sent to every server alike, and what comes of it."""

    @property
    def warm_up(self) -> Request:
        """A request of the load's length that no prefix cache knows."""

    def send(self, base_url: str, model: str) -> Any:
        """Put a server under the load; return what the client measured."""

    def result(self, policy: str, measured: Any, timeline: list[Sample]) -> Any:
        """Say what one policy did."""

    def title(self, results: Sequence[Any]) -> str:
        """Say what was asked of every server."""

    def table(self, results: Sequence[Any]) -> str:
        """Lay results out in Markdown."""

    def draw(self, path: Path, title: str, results: Sequence[Any]) -> None:
        """Draw them."""

    def write(self, path: Path) -> None:
        """Write the load as a file that ``--workload`` reads."""


@dataclass(frozen=True)
class Requests:
    """Requests of which none waits for another's reply."""

    name: str
    requests: Sequence[Request]
    seed: int
    rate: float
    concurrency: int | None

    @property
    def warm_up(self) -> Request:
        first, *rest = self.requests[0].messages
        return _warm((first, *rest), self.requests[0])

    def send(self, base_url: str, model: str) -> dict[str, Any]:
        from kvserve.bench.client import send

        return send(
            base_url,
            model,
            self.requests,
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

    def table(self, results: Sequence[request_result.Result]) -> str:
        return request_result.table(results)

    def draw(
        self, path: Path, title: str, results: Sequence[request_result.Result]
    ) -> None:
        request_result.draw(path, title, results)

    def write(self, path: Path) -> None:
        write_workload(path, self.requests)


@dataclass(frozen=True)
class Conversations:
    """Agents that talk beside each other."""

    name: str
    agents: Sequence[Agent]

    @property
    def warm_up(self) -> Request:
        first = self.agents[0]
        asked = ({"role": "user", "content": first.system + first.turns[0].user},)
        return _warm(asked, Request(asked, first.turns[0].output_tokens))

    def send(self, base_url: str, model: str) -> Any:
        from kvserve.bench.conversations import talk

        return talk(base_url, model, self.agents)

    def result(
        self, policy: str, measured: Any, timeline: list[Sample]
    ) -> agents_result.AgentsResult:
        said, seconds = measured
        return agents_result.AgentsResult(policy, seconds, said, timeline)

    def title(self, results: Sequence[agents_result.AgentsResult]) -> str:
        return agents_result.title_of(results, self.name, len(self.agents))

    def table(self, results: Sequence[agents_result.AgentsResult]) -> str:
        return agents_result.table(results)

    def draw(
        self, path: Path, title: str, results: Sequence[agents_result.AgentsResult]
    ) -> None:
        agents_result.draw(path, title, results)

    def write(self, path: Path) -> None:
        write_agents(path, self.agents)


def _warm(messages: tuple[dict[str, str], ...], request: Request) -> Request:
    first, *rest = messages
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
    assert said.keys() == {field.name for field in fields(AgentLoad)}
    return AgentLoad(**{key: one for key, one in said.items() if one is not None})


def _from_file(args: argparse.Namespace) -> Load:
    if args.prompt_tokens:
        raise UserError("--prompt-tokens: a workload file has prompts of its own")
    path = Path(args.workload)
    if not path.suffix:
        names = ", ".join([*WORKLOADS, AGENTS])
        raise UserError(f"--workload {args.workload}: choose one of {names}, or a file")
    agents = read_agents(path, args.output_tokens)
    if agents is not None:
        _refuse(args, _OF_REQUESTS, f"--workload {path} has turns, which follow")
        return Conversations(path.name, agents)
    requests = read_workload(path, args.output_tokens)
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
