# SPDX-License-Identifier: Apache-2.0
"""Makes a request say given tokens: teacher forcing through decoding.

A logits processor of vLLM. Log probabilities that vLLM reports are those before
processors, so they remain the model's own. An engine that ``kvserve eval`` starts has
it; a server has it with ``--logits-processors``, see ``FORCED_PROCESSOR``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from kvserve.engine.start.admission import check_token_ids
from kvserve.errors import UserError
from kvserve.extra_args import FORCED_TOKENS, said_in


class ForcedTokens(AdapterLogitsProcessor):
    """Forces the tokens that a request names in its extra arguments, then lets go."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        try:
            check_token_ids(sampling_params)
        except UserError as error:
            raise ValueError(f"{FORCED_TOKENS}: {error}") from None

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced: list[int] = said_in(params, FORCED_TOKENS) or []
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
