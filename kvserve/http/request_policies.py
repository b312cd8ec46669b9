# SPDX-License-Identifier: Apache-2.0
"""What a request asks of our own: what cannot be honoured gets 400 before the engine.

That is a policy of its own, tokens to be forced, beam search under a policy, and
several replies of a model that is greedy unless told otherwise. Chats whose system
prompts are protected have these made into spans of tokens.

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

from kvserve.engine.start.admission import PolicyGuard, check_forced
from kvserve.errors import UserError
from kvserve.extra_args import FORCED_TOKENS, POLICY, PROTECT, said_in
from kvserve.http.notices import notice
from kvserve.http.receipts import unique_id
from kvserve.http.system_prompts import protect_system_prompts
from kvserve.plan.protection import SYSTEM

PARAMETER = f"vllm_xargs.{POLICY}"
FORCED = f"vllm_xargs.{FORCED_TOKENS}"
PROTECTED = f"vllm_xargs.{PROTECT}"
_NOT_OF_BEAMS = {POLICY: PARAMETER, FORCED_TOKENS: FORCED, PROTECT: PROTECTED}

_CREATORS = {
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
}


def guard_requests(
    engine_client: Any, state: State, guard: PolicyGuard, protect: str = ""
) -> None:
    """Refuse requests that the server cannot honour.

    Args:
        protect: whose tokens are protected, as ``PolicySettings`` has it.
    """
    model_config = engine_client.model_config

    def check(prompt: Any, params: Any) -> None:
        try:
            check_forced(params, model_config)
        except UserError as error:
            raise _refused(str(error), FORCED) from None
        asked = [key for key in (POLICY, PROTECT) if said_in(params, key) is not None]
        if asked:
            known = isinstance(prompt, dict)
            length = extract_prompt_len(model_config, prompt) if known else None
            try:
                guard.admit(params, length)
            except UserError as error:
                raise _refused(str(error), f"vllm_xargs.{asked[0]}") from None
        if remark := guard.remark(params):
            notice(remark)

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
        responses.create_responses = _named_by_server(responses.create_responses)
    for name, method in _CREATORS.items():
        serving = getattr(state, name, None)
        if serving is not None:
            create = getattr(serving, method)
            default = serving.default_sampling_params.get("temperature")
            create = _sampling(create, greedy=default == 0)
            always = protect == SYSTEM and name == "openai_serving_chat"
            setattr(serving, method, _without_beams(create, guard, always))
    if protect:
        protect_system_prompts(
            state.online_renderer,
            always=protect == SYSTEM,
            refuse=lambda message: _refused(message, PROTECTED),
        )


def _checked_before(
    generate: Callable[..., Any], check: Callable[[Any, Any], None]
) -> Callable[..., Any]:
    """Check at the call: vLLM's generator runs no earlier than its first step."""

    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(prompt, sampling_params)
        return generate(prompt, sampling_params, *args, **kwargs)

    return checked


def _named_by_server(
    create: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Name responses as all else is named; a body may ask for any ``request_id``."""

    async def named(request: Any, raw_request: Any = None) -> Any:
        headers = {} if raw_request is None else raw_request.headers
        request.request_id = f"resp_{headers.get('X-Request-Id') or unique_id()}"
        return await create(request, raw_request)

    return named


def _sampling(
    create: Callable[..., Awaitable[Any]], greedy: bool
) -> Callable[..., Awaitable[Any]]:
    """Name the way out where several replies are asked for, and all would be one."""

    async def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        several = (request.n or 1) > 1 and not request.use_beam_search
        if greedy and several and request.temperature is None:
            message = "the model answers greedily by default; set temperature above 0"
            raise _refused(f"{request.n} replies would be one: {message}", "n")
        return await create(request, *args, **kwargs)

    return checked


def _without_beams(
    create: Callable[..., Awaitable[Any]], guard: PolicyGuard, protected: bool
) -> Callable[..., Awaitable[Any]]:
    """Refuse beam search where it would lose what a request or the server asks for.

    Args:
        protected: the server protects the system prompt of every such request.
    """

    async def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.use_beam_search:
            for key, parameter in _NOT_OF_BEAMS.items():
                if key in (request.vllm_xargs or {}):
                    message = f"beam search takes no {key}; leave one of them out"
                    raise _refused(message, parameter)
            if protected:
                message = (
                    "beam search would not protect the system prompt, as this server "
                    "does (--protect system); sample with n"
                )
                raise _refused(message, "use_beam_search")
            try:
                guard.admit_beams()
            except UserError as error:
                raise _refused(str(error), "use_beam_search") from None
        return await create(request, *args, **kwargs)

    return checked


def _refused(message: str, parameter: str = PARAMETER) -> VLLMValidationError:
    return VLLMValidationError(f"{parameter}: {message}", parameter=parameter)
