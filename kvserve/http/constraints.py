# SPDX-License-Identifier: Apache-2.0
"""Structured outputs that cannot be honoured get 400, whatever they came in.

vLLM's API process looks at a grammar, schema or expression only roughly; its engine
compiles it later, and what fails there is told as a fault of the server (500). So the
engine's own code compiles each one here first, beside the event loop, while a request
is rendered: before a stream has begun. Dead ends that show only while the model writes
end the request in the engine; these are told as the client's fault, too.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import torch
from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

_RENDERERS = ("render_chat", "render_completion", "render_responses")
_PATIENCE_SECONDS = 10.0
_AT_A_TIME = 2
# Some reasons repeat the whole schema.
_MOST_LETTERS = 300
# xgrammar says where in its source it noticed.
_SOURCE = re.compile(r"(\[[\d:]+\] )?\S+\.cc:\d+: (Check failed: .*? is false: )?")

_field: ContextVar[str] = ContextVar("field", default="structured_outputs")


class ConstraintGuard:
    """Compiles constraints on replies as the engine will.

    Args:
        config: of the engine. A backend that vLLM leaves open is settled in it: an
            engine has one backend for all, so the first request would choose it.
        patience: seconds that a compilation may take.
    """

    def __init__(self, config: VllmConfig, patience: float = _PATIENCE_SECONDS) -> None:
        self._config, self._patience = config, patience
        settings = config.structured_outputs_config
        if settings.backend == "auto":
            settings.backend = "xgrammar"
        self._free = asyncio.Semaphore(_AT_A_TIME)
        self._manager: StructuredOutputManager | None = None

    def longest(self, request: Any) -> SamplingParams | None:
        """The parameters of a request, as far as they constrain its reply."""
        if getattr(request, "use_beam_search", False):
            return None
        most = self._config.model_config.max_model_len
        params: SamplingParams = request.to_sampling_params(most, {})
        return params if params.structured_outputs is not None else None

    async def check(self, params: SamplingParams, field: str) -> None:
        """Refuse a constraint that does not compile, or permits no reply.

        Args:
            params: what the request asks for; validation changes it.
            field: where the request says it.

        Raises:
            VLLMValidationError: one line, for whoever wrote the request.
            GracefulHTTPError: others keep the compiler busy.
        """
        try:
            await asyncio.wait_for(self._free.acquire(), self._patience)
        except TimeoutError:
            raise GracefulHTTPError(
                "other requests' structured outputs are being compiled; try again",
                HTTPStatus.SERVICE_UNAVAILABLE,
            ) from None
        work = _beside_the_loop(lambda: self._try(params), self._free.release)
        try:
            fault = await asyncio.wait_for(asyncio.shield(work), self._patience)
        except TimeoutError:
            fault = f"takes longer than {self._patience:g} s to compile; simplify it"
        if fault is not None:
            raise _refused(field, fault)

    def _try(self, params: SamplingParams) -> str | None:
        """Compile, and say in one line what is wrong, if anything is."""
        if self._manager is None:
            self._manager = StructuredOutputManager(self._config)
            # We are in a thread already.
            self._manager._use_async_grammar_compilation = False
        manager = self._manager
        try:
            params._validate_structured_outputs(
                self._config.model_config,
                self._config.structured_outputs_config,
                getattr(manager, "tokenizer", None),
            )
        except (ValueError, VLLMValidationError) as error:
            return self._said(error)
        trial: Any = SimpleNamespace(
            request_id="trial",
            sampling_params=params,
            structured_output_request=StructuredOutputRequest.from_sampling_params(
                params
            ),
        )
        manager.grammar_init(trial)
        grammar = trial.structured_output_request.grammar
        if isinstance(grammar, Exception):
            return self._said(grammar)
        assert manager.backend is not None, "grammar_init makes one"
        permitted = manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(permitted, 0)
        if not torch.any(permitted):
            return "permits no reply at all; does a rule need itself to end?"
        return None

    @staticmethod
    def _said(error: Exception) -> str:
        """One line of what vLLM says, and of why it does."""
        said = [
            " ".join(_SOURCE.sub("", str(one)).split())[:_MOST_LETTERS].rstrip(".:")
            for one in (error, error.__cause__ or "")
        ]
        if "not supported by xgrammar" in said[0]:
            said[1] = (
                "start the server with --structured-outputs-config.backend guidance, "
                "or leave them out"
            )
        return said[0] if said[1] in said[0] else ": ".join(said)


def guard_constraints(engine_client: Any, state: State, guard: ConstraintGuard) -> None:
    """Check each request when it has been rendered, and what the engine makes of it."""
    renderer = getattr(state, "online_renderer", None)
    for name in _RENDERERS:
        render = getattr(renderer, name, None)
        if render is not None:
            setattr(renderer, name, _checked_after(render, guard))
    engine_client.generate = _told_apart(engine_client.generate)


def _checked_after(
    render: Callable[..., Awaitable[Any]], guard: ConstraintGuard
) -> Callable[..., Awaitable[Any]]:
    """Check after rendering, which makes constraints of tools."""

    async def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        field = _field_of(request)
        result = await render(request, *args, **kwargs)
        params = guard.longest(request)
        if params is not None:
            _field.set(field)
            await guard.check(params, field)
        return result

    return checked


def _field_of(request: Any) -> str:
    """Where a request, as it came, says what its reply is to look like."""
    own = getattr(request, "structured_outputs", None)
    if own is not None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        named = [kind for kind in kinds if getattr(own, kind) is not None]
        return f"structured_outputs.{named[0]}" if named else "structured_outputs"
    if getattr(request, "response_format", None) is not None:
        return "response_format"
    if getattr(request, "text", None) is not None:
        return "text.format"
    return "tools" if getattr(request, "tools", None) else "structured_outputs"


def _told_apart(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a constraint that came to a dead end from a fault of the server."""

    def told(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        constrained = getattr(sampling_params, "structured_outputs", None) is not None
        return _with_dead_ends(outputs) if constrained else outputs

    return told


async def _with_dead_ends(
    outputs: AsyncGenerator[Any, None],
) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):
        async for output in outputs:
            if any(one.finish_reason == "error" for one in output.outputs):
                raise _refused(
                    _field.get(),
                    "came to a point from which no reply goes on; does a rule need "
                    "itself to end?",
                )
            yield output


def _refused(field: str, fault: str) -> VLLMValidationError:
    return VLLMValidationError(f"{field}: {fault}", parameter=field)


def _beside_the_loop(
    work: Callable[[], str | None], done: Callable[[], None]
) -> asyncio.Future[str | None]:
    """Run ``work`` in a thread that holds up neither the loop nor the server's end.

    Args:
        done: called in the loop when the thread is done, waited for or not.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str | None] = loop.create_future()

    def settle(result: str | None, error: BaseException | None) -> None:
        done()
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="constraint", daemon=True).start()
    return future
