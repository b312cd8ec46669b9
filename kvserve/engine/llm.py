# SPDX-License-Identifier: Apache-2.0
"""The Python API: ``vllm.LLM`` under a cache policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from kvserve.engine.options import engine_options, prepare_environment
from kvserve.engine.preflight import check_start
from kvserve.engine.settings import PolicySettings
from kvserve.models import resolve_model
from kvserve.processor import settle_dtype


class LLM(vllm.LLM):
    """A ready ``vllm.LLM`` whose KV cache is budgeted per head.

    Args:
        model: a model name or directory; ``None`` is the embedded model.
        policy: a policy name or a TOML file; ``None`` is stock vLLM.
        policy_args: the policy's parameters.
        vllm_kwargs: every argument of ``vllm.LLM``.

    Raises:
        UserError: a policy, profile or option that cannot be served.

    Example:
        >>> LLM(policy="sink-recent", policy_args={"recent": 992}, max_model_len=4096)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        policy: str | None = "retrieval",
        policy_args: Mapping[str, Any] | None = None,
        **vllm_kwargs: Any,
    ) -> None:
        prepare_environment(vllm_kwargs)
        options: dict[str, Any] = {"model": resolve_model(model), **vllm_kwargs}
        options["dtype"] = settle_dtype(options.get("dtype"))
        if policy is not None:
            settings = PolicySettings(policy, dict(policy_args or {}))
            options = engine_options(settings, options)
            check_start(options)
        super().__init__(**options)
