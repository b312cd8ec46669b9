# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, which tells the manager of requests and cuts chunks by their plans.

Where requests share pages it keeps what those are cached under true to what is in them.
Nothing else about scheduling changes.
"""

from __future__ import annotations

from typing import Any, cast

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvserve.engine.scheduling.budget_range import BudgetRange
from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.scheduling.shared_manager import SharedPagedManager
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import rule_of_request


class HeadPagedScheduler(Scheduler):
    """Tells what a request's plan follows from before any of its pages are counted.

    That is its prompt, its longest reply and what it asks for itself, if it does. Of a
    range of budgets it gets one before it begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        self._pages = cast(HeadPagedManager, manager)
        self._shared = manager if isinstance(manager, SharedPagedManager) else None
        # What clients gave: a request's plan may change before it begins.
        self._salts: dict[str, str | None] = {}
        # vLLM asks the method below, under the name of its first user, for every cut.
        if self._pages.rule.may_select:
            self.need_mamba_block_aligned_split = True
        rule = self._pages.rule
        self._range: BudgetRange | None = None
        if isinstance(rule, MixedRule) and rule.levels:
            most = self.max_num_running_reqs
            self._range = BudgetRange(rule, self._pages, most)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._range is not None:
            for request in self._range.share_out(self.waiting, self.running):
                self._expect(request)
        output = super().schedule(*args, **kwargs)
        if self._range is not None:
            self._range.note_begun(output.scheduled_new_reqs)
        return output

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        plan = self._pages.plan_of(request.request_id)
        return plan.chunk(request.num_computed_tokens, num_new_tokens)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        for name in scheduler_output.scheduled_spec_decode_tokens:
            request = self.requests.get(name)
            if request is not None:
                self._accept(request)
        return outputs

    def _accept(self, request: Request) -> None:
        """Tell how many tokens a request really has: guesses do not count.

        A reply may end before the last of those that were right.
        """
        if self.num_spec_tokens:
            read = min(request.num_computed_tokens, request.num_tokens - 1)
            self._pages.accept(request.request_id, read)

    def add_request(self, request: Request) -> None:
        self._expect(request)
        super().add_request(request)

    def _expect(self, request: Request) -> None:
        """Tell the manager of a request, or of its new budget."""
        lengths = request.num_prompt_tokens, request.max_tokens
        named = rule_of_request(self._pages.rule, request.sampling_params, sum(lengths))
        self._pages.expect(request.request_id, *lengths, named)
        if self._shared is not None:
            self._name_plan(request, self._shared)

    def _name_plan(self, request: Request, pages: SharedPagedManager) -> None:
        """Make a plan of the request's own part of the hashes of its blocks.

        What a cached token holds follows from all that the layers before have seen.
        """
        plan = pages.plan_of(request.request_id)
        salt = self._salts.setdefault(request.request_id, request.cache_salt)
        own = "" if plan == pages.common_plan else plan.digest
        if not own and not salt:
            return
        # A salt that somebody chose never reads like one of ours.
        request.cache_salt = f"{own}:{salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # Under --scheduling-policy priority a request may lose its place in the very
        # step that was to fill its blocks. They have their names since then.
        if self._shared is not None:
            self._shared.uncache(request, request.num_computed_tokens)
        self._accept(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_blocks(self, request: Request) -> None:
        self._accept(request)
        super()._free_blocks(request)
        self._pages.forget(request.request_id)
        self._salts.pop(request.request_id, None)
        if self._range is not None:
            self._range.forget(request.request_id)
