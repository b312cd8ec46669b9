# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, for policies under which requests have plans of their own."""

from __future__ import annotations

from typing import Any, cast

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvserve.engine.manager import HeadPagedManager


class ElasticScheduler(Scheduler):
    """Names a request's prompt and longest reply before any of its pages are counted.

    Nothing about scheduling changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        self._pages = cast(HeadPagedManager, manager)

    def add_request(self, request: Request) -> None:
        self._pages.expect(
            request.request_id, request.num_prompt_tokens, request.max_tokens
        )
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._pages.forget(request.request_id)
