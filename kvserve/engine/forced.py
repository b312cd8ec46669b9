# SPDX-License-Identifier: Apache-2.0
"""Makes a request say given tokens: teacher forcing through decoding.

A logits processor of vLLM. Log probabilities that vLLM reports are those before
processors, so they remain the model's own. An engine that ``kvserve eval`` starts has
it; a server has it with ``--logits-processors kvserve.engine.forced:ForcedTokens``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from kvserve.errors import UserError
from kvserve.evaluation.backend import FORCED_PROCESSOR, FORCED_TOKENS


class ForcedTokens(AdapterLogitsProcessor):
    """Forces the tokens that a request names in its extra arguments, then lets go."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        try:
            _check_list(sampling_params)
        except UserError as error:
            raise ValueError(f"{FORCED_TOKENS}: {error}") from None

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced: list[int] = forced_in(params) or []
        if not forced:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) >= len(forced):
                return logits
            chosen = logits[forced[len(output)]].clone()
            logits.fill_(float("-inf"))
            # Whatever its logit was, it is the only token left.
            logits[forced[len(output)]] = chosen.nan_to_num(0.0)
            return logits

        return force


def forced_in(params: Any) -> Any:
    """What a request names, or ``None``."""
    return (getattr(params, "extra_args", None) or {}).get(FORCED_TOKENS)


def check_forced(params: Any, model: ModelConfig) -> None:
    """Refuse tokens that cannot be forced, before the engine sees them.

    The processor itself cannot: it is asked without the model's vocabulary, and an
    error while it runs would end the engine for everybody.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    forced = forced_in(params)
    if forced is None:
        return
    loaded = model.logits_processors or []
    if FORCED_PROCESSOR not in loaded and ForcedTokens not in loaded:
        raise UserError(
            "this server forces no tokens; start it with `--logits-processors "
            f"{FORCED_PROCESSOR}`, or leave the field out"
        )
    _check_list(params)
    most, vocabulary = params.max_tokens or model.max_model_len, model.get_vocab_size()
    if len(forced) > most:
        raise UserError(
            f"{len(forced)} tokens are more than the reply's {most}; raise max_tokens, "
            "or name fewer"
        )
    beyond = [token for token in forced if token >= vocabulary]
    if beyond:
        raise UserError(
            f"{beyond[0]} is no token: the vocabulary has {vocabulary}, from 0 on"
        )
    if params.structured_outputs is not None:
        raise UserError(
            "tokens cannot be forced beside structured outputs; leave one of them out"
        )


def _check_list(params: Any) -> None:
    forced = forced_in(params)
    if forced is None:
        return
    whole = isinstance(forced, list) and all(type(token) is int for token in forced)
    if not whole or any(token < 0 for token in forced):
        raise UserError("expected a list of token ids, whole numbers from 0 on")
