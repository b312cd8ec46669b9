# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, where requests have plans of their own."""

from __future__ import annotations

from typing import Any, cast

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvserve.engine.manager import HeadPagedManager
from kvserve.engine.named_policies import rule_of_request


class ElasticScheduler(Scheduler):
    """Tells what a request's plan follows from before any of its pages are counted.

    That is its prompt, its longest reply and the policy that it names, if it names one.
    Nothing about scheduling changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        self._pages = cast(HeadPagedManager, manager)

    def add_request(self, request: Request) -> None:
        lengths = request.num_prompt_tokens, request.max_tokens
        named = rule_of_request(self._pages.rule, request.sampling_params, sum(lengths))
        self._pages.expect(request.request_id, *lengths, named)
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._pages.forget(request.request_id)
