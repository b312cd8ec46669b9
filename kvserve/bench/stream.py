# SPDX-License-Identifier: Apache-2.0
"""One streamed reply, as a client sees it: when which tokens came, and whether all did.

A chunk may carry no token (it names the role), one, or several. Servers say how many
there are so far in a chunk's own ``usage`` (``continuous_usage_stats``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"


@dataclass
class Reply:
    """What has come of a reply so far.

    Attributes:
        first: when its first token came, s, on the clock of ``add``; ``None`` before.
        last: when its last one came.
        gaps: seconds between two tokens. Tokens that came together share the time
            since the one before; what came with the first has no gap.
        tokens: how many there are, as the server counts.
        prompt_tokens: of the request, as the server counts.
        text: of the reply.
        fault: what the server said went wrong in the middle.
    """

    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""
    fault: str = ""
    _counted: bool = False
    _ended: bool = False

    def add(self, chunk: dict[str, Any], now: float) -> None:
        """Take one chunk of the stream, already parsed, that came at ``now``."""
        if error := chunk.get("error"):
            known = isinstance(error, dict) and "message" in error
            self.fault = str(error["message"] if known else error)
            return
        usage, choices = chunk.get("usage"), chunk.get("choices")
        if choices:
            text = (choices[0].get("delta") or {}).get("content") or ""
            self.text += text
            if usage is not None:
                self._came(usage.get("completion_tokens") or 0, now)
            elif text and not self._counted:
                self._came_uncounted(now)
        elif usage is not None:
            self._total(usage)

    def end(self) -> str:
        """Close the reply; return why it is not a whole one, or nothing."""
        if self.fault:
            return self.fault
        if not self._ended:
            return f"the stream broke off after {self.tokens} tokens"
        return "" if self.first is not None else "the reply has no token"

    def _came(self, tokens: int, now: float) -> None:
        self._counted = True
        new = tokens - self.tokens
        if new <= 0:
            return
        if self.first is None:
            self.first = now
        else:
            self.gaps += [(now - self.last) / new] * new
        self.tokens, self.last = tokens, now

    def _came_uncounted(self, now: float) -> None:
        """A server that counts no chunks: how many there were is told at the end."""
        self.first = now if self.first is None else self.first
        self.last = now

    def _total(self, usage: dict[str, Any]) -> None:
        self._ended = True
        self.prompt_tokens = usage.get("prompt_tokens") or 0
        total = usage.get("completion_tokens") or 0
        if not self._counted and self.first is not None and total > 1:
            self.gaps = [(self.last - self.first) / (total - 1)] * (total - 1)
        self.tokens = total
