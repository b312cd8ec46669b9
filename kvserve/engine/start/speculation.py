# SPDX-License-Identifier: Apache-2.0
"""Which speculative decoding a policy can be served with.

What is guessed is vLLM's own affair; what the cache makes of it is the page plan's
(``PagePlan.lookahead``). Methods that need no model guess on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from vllm.config import VllmConfig

from kvserve.engine.devices import hardware
from kvserve.errors import UserError

FLAG = "--speculative-config"
_METHODS = ("ngram", "suffix")
_BRACKETED = "[ngram]"
"""What vLLM takes for ``ngram``, as a method and as a model."""


def check_guessing(options: Mapping[str, Any]) -> None:
    """Refuse, before vLLM makes a configuration, guesses that cannot be served.

    Args:
        options: vLLM engine options by field name, as far as the user gave them.

    Raises:
        UserError: says which methods can.
    """
    asked = options.get("speculative_config")
    if not asked:
        return
    model = asked.get("model")
    method = asked.get("method") or (model if model in (*_METHODS, _BRACKETED) else "")
    _check_method("ngram" if method == _BRACKETED else method)
    if hardware.has_gpu():
        raise UserError(
            f"{FLAG}: policies guess on CPUs only so far; leave it out, or serve with "
            "stock vLLM: `--policy none`"
        )
    if options.get("logits_processors"):
        raise UserError(
            f"{FLAG}: vLLM asks --logits-processors about one token at a time; leave "
            "one out"
        )


def check_method(vllm_config: VllmConfig) -> None:
    """Refuse what :func:`check_guessing` would have, and models that keep states.

    Raises:
        UserError: names the flag and the way out.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    _check_method(str(speculative.method))
    model = vllm_config.model_config
    if model.is_hybrid:
        raise UserError(
            f"{FLAG}: MODEL {model.model} keeps states beside its cache, which cannot "
            "go back to before a refused token; leave it out"
        )


def _check_method(method: str) -> None:
    if method not in _METHODS:
        given = f"method {method}" if method else "a model"
        raise UserError(
            f"{FLAG}: under a policy guesses come from {' or '.join(_METHODS)}, not "
            f"from {given}; give "
            '{"method": "ngram", "num_speculative_tokens": 4}, or serve with stock '
            "vLLM: `--policy none`"
        )
    if method == "suffix" and find_spec("arctic_inference") is None:
        raise UserError(
            f"{FLAG}: method suffix needs the package arctic-inference; install it, or "
            "use method ngram"
        )
