# SPDX-License-Identifier: Apache-2.0
"""The Python API: ``vllm.LLM`` under a cache policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm
from vllm.entrypoints.generate.beam_search.utils import BeamSearchOutput
from vllm.utils import length_from_prompt_token_ids_or_embeds

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.admission import PolicyGuard, check_forced
from kvserve.engine.start.options import (
    engine_options,
    prepare_environment,
    stock_has_no_policies,
)
from kvserve.engine.start.preflight import check_start
from kvserve.errors import UserError
from kvserve.extra_args import FORCED_TOKENS, POLICY, PROTECT, said_in
from kvserve.models import resolve_model
from kvserve.processor import settle_dtype
from kvserve.profiling.fast import profile_arguments
from policies.files import forget


class LLM(vllm.LLM):
    """A ready ``vllm.LLM`` whose KV cache is budgeted per head.

    Args:
        model: a model name or directory; ``None`` is the embedded model.
        policy: a policy as ``NAME[:KEY=VALUE,...]``, or a TOML file; ``None`` is stock
            vLLM. Every policy takes ``budget``, a share of the KV entries of the
            longest request (``25%``, ``0.25``) or tokens (``512``), or a range of
            either (``50%..12.5%``), of which each request gets what there is room for.
            ``retrieval`` has a model measured, once, for which no profile ships.
        policy_args: more of the policy's parameters.
        allow_request_policies: let a request name another policy of positions, by
            ``SamplingParams(extra_args={"kv_policy": "sink-recent:recent=480"})``.
        protect: let a request have tokens protected, by
            ``SamplingParams(extra_args={"kv_protect": "0-200"})``.
        vllm_kwargs: every argument of ``vllm.LLM``.

    Raises:
        UserError: a policy, profile or option that cannot be served.

    Example:
        >>> LLM(policy="sink-recent:budget=25%", max_model_len=4096)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        policy: str | None = "retrieval",
        policy_args: Mapping[str, Any] | None = None,
        allow_request_policies: bool = False,
        protect: bool = False,
        **vllm_kwargs: Any,
    ) -> None:
        forget()
        prepare_environment(vllm_kwargs)
        options: dict[str, Any] = {"model": resolve_model(model), **vllm_kwargs}
        options["dtype"] = settle_dtype(options.get("dtype"))
        if policy is not None:
            arguments = profile_arguments(
                policy, dict(policy_args or {}), options["model"], make=True
            )
            allowed = allow_request_policies, "requests" if protect else ""
            settings = PolicySettings(policy, arguments, *allowed)
            options = engine_options(settings, options)
            check_start(options)
        elif allow_request_policies or protect:
            flag = "--allow-request-policies" if allow_request_policies else "--protect"
            raise stock_has_no_policies(flag)
        super().__init__(**options)
        config = self.llm_engine.vllm_config
        self._policy_guard = PolicyGuard.of_engine(config, policy is not None)
        _guard(self.llm_engine, self._policy_guard)

    def beam_search(self, *args: Any, **kwargs: Any) -> list[BeamSearchOutput]:
        """As vLLM's, under policies that give it their real result.

        Raises:
            UserError: the policy would never compress.
        """
        self._policy_guard.admit_beams()
        return super().beam_search(*args, **kwargs)


def _guard(engine: Any, guard: PolicyGuard) -> None:
    """Refuse requests that cannot be honoured before the engine sees them.

    vLLM has no hook for it, so this instance's input processor gets one.
    """
    process = engine.input_processor.process_inputs

    def checked(*args: Any, **kwargs: Any) -> Any:
        request = process(*args, **kwargs)
        params = request.sampling_params
        try:
            check_forced(params, engine.vllm_config.model_config)
        except UserError as error:
            raise UserError(f"{FORCED_TOKENS}: {error}") from None
        if any(said_in(params, key) is not None for key in (POLICY, PROTECT)):
            prompt = length_from_prompt_token_ids_or_embeds(
                request.prompt_token_ids, request.prompt_embeds
            )
            guard.admit(params, prompt)
        return request

    engine.input_processor.process_inputs = checked
