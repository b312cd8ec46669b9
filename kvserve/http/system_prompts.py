# SPDX-License-Identifier: Apache-2.0
"""Protects system prompts of chats: ``kv_protect: system`` becomes a span of tokens.

Every route that takes messages has vLLM's renderer make tokens of them, by one method
that knows request, messages and prompt; the instance of this API process gets a hook.
The prompt is compared with what the template makes of its leading system messages and
two other user turns: what all share is ahead of anything a user wrote. Whatever the
template adds there, a default system prompt or tools, is protected, too.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvserve.errors import UserError
from kvserve.extra_args import PROTECT
from kvserve.plan.protection import SYSTEM
from kvserve.system_prompts import TURNS, common_start

_MOST_KNOWN = 128
_ROLES = {"system", "developer"}
_SHAPING = "add_special_tokens", "truncate_prompt_tokens", "truncation_side"
"""What a request says that changes the tokens of a prompt, beside its template's."""

Render = Callable[..., Awaitable[Any]]
Refuse = Callable[[str], Exception]


def protect_system_prompts(renderer: Any, always: bool, refuse: Refuse) -> None:
    """Have chats that ask for it name the tokens of their system prompt.

    Args:
        renderer: vLLM's ``OnlineRenderer``.
        always: chats ask for it unless they say something else.
        refuse: makes an error that gets 400 of a message.
    """
    starts = _Starts(renderer.preprocess_chat)

    async def rendered(
        request: Any, messages: list[Any], *args: Any, **other: Any
    ) -> Any:
        if not _asks(request, always):
            return await starts.render(request, messages, *args, **other)
        leading = _leading(messages)
        found = await starts.render(request, messages, *args, **other)
        (prompt,) = found[1]
        try:
            tokens = await starts.count(prompt, request, leading, args, other)
        except UserError as error:
            raise refuse(str(error)) from error
        extra = {**(request.vllm_xargs or {}), PROTECT: f"0-{tokens}"}
        if not tokens:
            del extra[PROTECT]
        request.vllm_xargs = extra
        return found

    renderer.preprocess_chat = rendered


class _Starts:
    """How chats of a system prompt begin, the last that were asked for.

    Attributes:
        render: the renderer's own method.
    """

    def __init__(self, render: Render) -> None:
        self.render = render
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    async def count(
        self,
        prompt: Any,
        request: Any,
        leading: list[Any],
        args: Sequence[Any],
        other: dict[str, Any],
    ) -> int:
        """Count the tokens of a prompt that are ahead of its first turn.

        Args:
            prompt: what the renderer made of the chat, for the engine.
            leading: the messages that it begins with and that are the system's.
            args, other: what else the renderer was asked with.

        Raises:
            UserError: the template makes nothing of these messages.
        """
        tokens: list[int] = prompt.get("prompt_token_ids") or []
        key = _key(request, leading, args, other)
        start = self._known.get(key)
        # A template may say what day it is.
        if start is None or tokens[: len(start)] != start:
            chats = [
                await self._probe(request, leading, turn, args, other) for turn in TURNS
            ]
            start = chats[0][: common_start(chats)]
            self._known[key] = start
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return common_start([tokens, start])

    async def _probe(
        self,
        request: Any,
        leading: list[Any],
        turn: str,
        args: Sequence[Any],
        other: dict[str, Any],
    ) -> list[int]:
        """Tokens of a chat with the same system prompt and another user turn."""
        messages = [*leading, {"role": "user", "content": turn}]
        # Without a parser, which would change what the request asks of its reply.
        other = {**other, "parser": None}
        try:
            _, (prompt,) = await self.render(
                request.model_copy(), messages, *args, **other
            )
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise UserError(
                "the chat template does not tell where the system prompt ends "
                f"({reason}); name spans of tokens, such as 0-200"
            ) from error
        found: list[int] = prompt.get("prompt_token_ids") or []
        return found


def _asks(request: Any, always: bool) -> bool:
    """Whether a request is answered by the engine and has its system prompt spared."""
    if not hasattr(request, "vllm_xargs"):
        return False
    said = (request.vllm_xargs or {}).get(PROTECT)
    return bool(said == SYSTEM or (always and said is None))


def _leading(messages: list[Any]) -> list[Any]:
    """The messages ahead of the first turn, whose contents may be read again."""
    leading = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            break
        content = message.get("content")
        # A body's list of parts may be something that is read once.
        if content is not None and not isinstance(content, str):
            message["content"] = list(content)
        leading.append(message)
    return leading


def _key(
    request: Any, leading: list[Any], args: Sequence[Any], other: dict[str, Any]
) -> str:
    """Name all that a system prompt's tokens follow from, in few bytes."""
    own = [getattr(request, name, None) for name in _SHAPING]
    chat = request.build_chat_params(None, "auto")
    asked = {key: value for key, value in other.items() if key != "parser"}
    text = repr((leading, own, chat, args, asked))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
