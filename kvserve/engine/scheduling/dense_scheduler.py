# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, with chunks cut where a dense prefill needs them cut."""

from __future__ import annotations

from typing import Any, cast

from vllm.v1.request import Request

from kvserve.engine.scheduling.scheduler import ElasticScheduler
from kvserve.plan.dense import DenseRule


class DenseScheduler(ElasticScheduler):
    """Ends a chunk at the end of the prompt, and makes the last chunk long enough.

    Nothing else about scheduling changes. A preempted request reads its prompt again
    and then its own output token by token, as it did the first time, so that what it
    keeps does not depend on having been preempted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rule = cast(DenseRule, self._pages.rule)
        self._window = rule.policy.observation_window
        # vLLM asks the method below, under the name of its first user, for every cut.
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        return cut(
            request.num_computed_tokens,
            num_new_tokens,
            request.num_prompt_tokens,
            self._window,
        )


def cut(start: int, new_tokens: int, prompt_tokens: int, window: int) -> int:
    """Return how many of ``new_tokens`` to compute now; 0 waits for a larger budget.

    Args:
        start: Tokens computed so far.
        window: Last prompt tokens that must be read in one chunk.
    """
    if start >= prompt_tokens:
        return min(new_tokens, 1)
    if start + new_tokens >= prompt_tokens:
        return prompt_tokens - start
    latest = max(prompt_tokens - window, start)
    return min(new_tokens, latest - start)
