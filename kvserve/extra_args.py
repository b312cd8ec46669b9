# SPDX-License-Identifier: Apache-2.0
"""What a request may say to kvserve: entries of ``vllm_xargs`` in its body.

vLLM carries them to ``SamplingParams.extra_args``, and these to scheduler and worker,
which trust what ``kvserve.engine.start.admission`` let pass.
"""

from __future__ import annotations

from typing import Any

POLICY = "kv_policy"
"""A policy of the request's own, ``NAME[:KEY=VALUE,...]``."""

PROTECT = "kv_protect"
"""Tokens that eviction must spare: ``system``, or spans of positions."""

LEVEL = "kvserve_level"
"""Which budget of a range a request got; the scheduler writes it for the worker."""

FORCED_TOKENS = "kvserve_forced_tokens"
"""Token ids that the reply begins with, as if the model had chosen them."""

FORCED_PROCESSOR = "kvserve.engine.worker.forced_tokens:ForcedTokens"
"""The logits processor that forces them."""


def said_in(params: Any, key: str) -> Any:
    """What sampling parameters say under ``key``, or ``None``."""
    return (getattr(params, "extra_args", None) or {}).get(key)
