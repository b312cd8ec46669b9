# SPDX-License-Identifier: Apache-2.0
"""Has agents talk to a server, beside each other and each turn behind the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
)

from kvserve.bench.agents import Agent, Turn
from kvserve.bench.client import ENDPOINT, ask
from kvserve.bench.workloads import Message


@dataclass(frozen=True)
class Said:
    """One turn, as its agent saw it; times in seconds, of sending the turn.

    Attributes:
        turn: its number in the conversation, from 0.
        prompt_tokens: of all that was sent, as the server counts.
        error: why there is no whole reply, or nothing.
    """

    turn: int
    ttft: float
    gaps: list[float]
    prompt_tokens: int
    output_tokens: int
    error: str


def talk(
    base_url: str, model: str, agents: Sequence[Agent], progress: bool = True
) -> tuple[list[Said], float]:
    """Have all agents talk; return their turns, and the seconds until the last reply.

    Replies are greedy and exactly as long as a turn says. An agent whose turn fails
    says no more.
    """
    return asyncio.run(_talk(base_url, model, agents, progress))


async def _talk(
    base_url: str, model: str, agents: Sequence[Agent], progress: bool
) -> tuple[list[Said], float]:
    turns = sum(len(agent.turns) for agent in agents)
    said: list[Said] = []
    start = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    with tqdm(total=turns, desc="turns", disable=not progress) as bar:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            each = [_converse(http, base_url, model, one, said, bar) for one in agents]
            await asyncio.gather(*each)
    return said, time.perf_counter() - start


async def _converse(
    http: aiohttp.ClientSession,
    base_url: str,
    model: str,
    agent: Agent,
    said: list[Said],
    bar: tqdm,
) -> None:
    await asyncio.sleep(agent.start)
    history: list[Message] = []
    if agent.system:
        history.append({"role": "system", "content": agent.system})
    for number, turn in enumerate(agent.turns):
        await asyncio.sleep(turn.think)
        history.append({"role": "user", "content": turn.user})
        reply = await ask(_request(base_url, model, history, turn), http)
        said.append(_said(number, reply))
        bar.update(1)
        if reply.error:
            return
        history.append({"role": "assistant", "content": reply.generated_text})


def _request(
    base_url: str, model: str, history: Sequence[Message], turn: Turn
) -> RequestFuncInput:
    return RequestFuncInput(
        prompt=turn.user,
        api_url=base_url + ENDPOINT,
        prompt_len=0,
        output_len=turn.output_tokens,
        model=model,
        ignore_eos=True,
        extra_body={"temperature": 0.0},
        chat_messages=[dict(message) for message in history],
    )


def _said(number: int, reply: RequestFuncOutput) -> Said:
    return Said(
        number,
        reply.ttft,
        list(reply.itl),
        reply.prompt_len,
        reply.output_tokens,
        reply.error,
    )
