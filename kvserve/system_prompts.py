# SPDX-License-Identifier: Apache-2.0
"""Where the system prompt of a chat ends, whatever a template makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

TURNS = "A", "0"
"""Two user turns that share no token: what chats with them share is ahead of both."""


def common_start(prompts: Iterable[Sequence[int]]) -> int:
    """Count the first tokens that all prompts have."""
    count = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
