# SPDX-License-Identifier: Apache-2.0
"""A policy per request: what cannot be honoured gets 400 before the engine sees it.

vLLM has no hook between a request that it has read and its engine, so the instances of
this API process get one. ``generate`` of the engine's client is on the way of every
route, and knows the prompt's length. Two things do not come by there in time:

* the Responses API calls it when its stream has begun: too late for a status;
* beam search makes parameters of its own, and ``vllm_xargs`` get lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import State
from vllm.exceptions import VLLMValidationError
from vllm.renderers.inputs.preprocess import extract_prompt_len

from kvserve.engine.named_policies import KEY, PolicyGuard, named_in
from kvserve.errors import UserError

PARAMETER = f"vllm_xargs.{KEY}"

_WITH_BEAMS = {
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
}


def guard_requests(engine_client: Any, state: State, guard: PolicyGuard) -> None:
    """Refuse requests whose policy the server cannot honour."""
    model_config = engine_client.model_config

    def check(prompt: Any, params: Any) -> None:
        if named_in(params) is None:
            return
        known = isinstance(prompt, dict)
        length = extract_prompt_len(model_config, prompt) if known else None
        try:
            guard.admit(params, length)
        except UserError as error:
            raise _refused(str(error)) from None

    engine_client.generate = _checked_before(engine_client.generate, check)
    responses = getattr(state, "openai_serving_responses", None)
    if responses is not None:
        answer = responses._generate_with_builtin_tools

        def checked(*, engine_input: Any, sampling_params: Any, **others: Any) -> Any:
            check(engine_input, sampling_params)
            return answer(
                engine_input=engine_input, sampling_params=sampling_params, **others
            )

        responses._generate_with_builtin_tools = checked
    for name, method in _WITH_BEAMS.items():
        serving = getattr(state, name, None)
        if serving is not None:
            setattr(serving, method, _without_beams(getattr(serving, method)))


def _checked_before(
    generate: Callable[..., Any], check: Callable[[Any, Any], None]
) -> Callable[..., Any]:
    """Check at the call: vLLM's generator runs no earlier than its first step."""

    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(prompt, sampling_params)
        return generate(prompt, sampling_params, *args, **kwargs)

    return checked


def _without_beams(
    create: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Refuse a policy that beam search would lose."""

    async def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.use_beam_search and KEY in (request.vllm_xargs or {}):
            raise _refused(f"beam search takes no {KEY}; leave one of them out")
        return await create(request, *args, **kwargs)

    return checked


def _refused(message: str) -> VLLMValidationError:
    return VLLMValidationError(f"{PARAMETER}: {message}", parameter=PARAMETER)
