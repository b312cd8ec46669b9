# SPDX-License-Identifier: Apache-2.0
"""What agents ask: conversations whose turns follow each other, from a seed or a file.

All agents have one system prompt. What a turn adds is a question or what a tool found;
it is sent as the user's, which every chat template takes. The server's own replies are
part of what the next turn sends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from kvserve.bench.workloads import FOLLOW_UPS, Lines, prose, reply_tokens
from kvserve.errors import UserError

_FORM = (
    'expected {"system": "...", "start": 0, "turns": [{"user": "...", "output_tokens": '
    '64, "think": 1.5}]}'
)
_TOOLS = ("search", "read_file", "run_tests", "open_page")


@dataclass(frozen=True)
class Turn:
    """What an agent adds to a conversation.

    Attributes:
        user: the text.
        output_tokens: length of the reply.
        think: seconds before it is sent, after the last reply or the agent's start.
    """

    user: str
    output_tokens: int
    think: float = 0.0


@dataclass(frozen=True)
class Agent:
    """A conversation: its system prompt, if any, its turns, and when it starts, s."""

    system: str
    turns: tuple[Turn, ...]
    start: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """One line of a trace."""
        turns = [vars(turn) for turn in self.turns]
        return {"system": self.system, "start": self.start, "turns": turns}


@dataclass(frozen=True)
class AgentLoad:
    """How many agents there are and how long they talk; lengths in tokens.

    Attributes:
        shared: of the system prompt.
        new: that a turn adds, within a quarter of it.
        reply: of a reply, exactly.
        think: mean seconds between a reply and the next turn.
    """

    agents: int = 16
    turns: int = 8
    shared: int = 2000
    new: int = 500
    reply: int = 64
    think: float = 1.0

    def draw(self, seed: int) -> list[Agent]:
        """Return the agents: the same text for every model, policy and machine."""
        rng = random.Random(f"agents/{seed}")
        known = prose(rng, self.shared)
        system = f"You are a helpful agent. This is what you know:\n{known}"
        return [self._agent(seed, number, system) for number in range(self.agents)]

    def _agent(self, seed: int, number: int, system: str) -> Agent:
        rng = random.Random(f"agents/{seed}/{number}")
        turns = []
        for turn in range(self.turns):
            text = prose(rng, self.new * rng.uniform(0.75, 1.25))
            if turn % 2:
                text = f"Result of {rng.choice(_TOOLS)}:\n{text}"
            else:
                text = f"{rng.choice(FOLLOW_UPS)} {text}"
            think = rng.expovariate(1 / self.think) if self.think else 0.0
            turns.append(Turn(text, self.reply, think))
        return Agent(system, tuple(turns))


def agents_in(lines: Lines, output_tokens: int | None = None) -> list[Agent] | None:
    """Agents of a trace, a line each; ``None`` if the first line is no agent.

    Args:
        output_tokens: length of every reply, instead of what the file says.

    Raises:
        UserError: names the file, the line and what is wrong with it.
    """
    if "turns" not in lines[0][1]:
        return None
    return [_agent(record, output_tokens, where) for where, record in lines]


def _agent(record: dict[str, Any], output_tokens: int | None, where: str) -> Agent:
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: turns must be a list; {_FORM}")
    system = record.get("system", "")
    if not isinstance(system, str):
        raise UserError(f"{where}: system must be text")
    read = (_turn(turn, output_tokens, where) for turn in turns)
    return Agent(system, tuple(read), _seconds(record, "start", where))


def _turn(record: Any, output_tokens: int | None, where: str) -> Turn:
    if not isinstance(record, dict) or not isinstance(record.get("user"), str):
        raise UserError(f"{where}: each turn needs a text as user; {_FORM}")
    tokens = reply_tokens(record, output_tokens, where)
    return Turn(record["user"], tokens, _seconds(record, "think", where))


def _seconds(record: dict[str, Any], key: str, where: str) -> float:
    value = record.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"{where}: {key} must be seconds of at least 0")
    return float(value)
