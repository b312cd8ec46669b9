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
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from kvserve.evaluation.backend import FORCED_TOKENS


class ForcedTokens(AdapterLogitsProcessor):
    """Forces the tokens that a request names in its extra arguments, then lets go."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        forced = _forced(sampling_params)
        if not isinstance(forced, list) or not all(type(t) is int for t in forced):
            raise ValueError(f"{FORCED_TOKENS}: expected a list of token ids")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = _forced(params)
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


def _forced(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get(FORCED_TOKENS) or []
