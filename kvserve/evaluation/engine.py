# SPDX-License-Identifier: Apache-2.0
"""Drives an engine in this process for ``kvserve eval``, and counts its pages."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.engine.start.llm import LLM
from kvserve.errors import UserError
from kvserve.evaluation.backend import (
    AT_ONCE,
    TOP,
    Pages,
    Reply,
    Request,
    generated_text,
)
from kvserve.extra_args import FORCED_PROCESSOR, FORCED_TOKENS, PROTECT

_STEP_TOKENS = 2048


class EngineBackend:
    """``kvserve.LLM`` under one policy; only one can live at a time.

    Needs ``VLLM_ENABLE_V1_MULTIPROCESSING=0``: pages are counted in the scheduler.

    Args:
        model: model directory or hub name.
        policy: the policy's name, or a TOML file.
        policy_args: its parameters.
        longest: tokens of the longest request, prompt and reply.
        dtype: of weights and cache.
        kv_memory: bytes of the pool.
        protect: spare the system prompts of all requests.
    """

    def __init__(
        self,
        model: str,
        policy: str,
        policy_args: Mapping[str, Any],
        *,
        longest: int,
        dtype: str,
        kv_memory: int,
        kv_cache_dtype: str = "auto",
        protect: bool = False,
    ) -> None:
        try:
            self._llm = LLM(
                model,
                policy=policy,
                policy_args=policy_args,
                protect=protect,
                dtype=dtype,
                max_model_len=longest,
                max_num_seqs=AT_ONCE,
                max_num_batched_tokens=_STEP_TOKENS,
                kv_cache_memory_bytes=kv_memory,
                kv_cache_dtype=kv_cache_dtype,
                max_logprobs=TOP,
                logits_processors=[FORCED_PROCESSOR],
                enforce_eager=True,
                enable_prefix_caching=False,
                use_tqdm_on_load=False,
            )
        except UserError as error:
            # What this command calls them.
            message = str(error).replace("--kv-cache-memory-bytes", "--kv-memory")
            raise UserError(message.replace("--max-model-len", "--length")) from None
        core: Any = self._llm.llm_engine.engine_core
        scheduler = core.engine_core.scheduler
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._books = PageBooks(manager)
        self._clock = FirstTokens(scheduler)
        self._protect = protect

    def run(
        self, requests: Sequence[Request], done: Callable[[Request], None]
    ) -> list[Reply]:
        """Run all requests together, as many at a time as fit."""
        engine = self._llm.llm_engine
        # vLLM answers under the name it was given, and counts pages under its own.
        internal = [
            engine.add_request(
                str(number),
                {"prompt_token_ids": request.prompt},
                _sampling(request, self._protect),
            )
            for number, request in enumerate(requests)
        ]
        replies: dict[int, Reply] = {}
        try:
            while engine.has_unfinished_requests():
                self._clock.start()
                outputs = engine.step()
                self._clock.note()
                for output in outputs:
                    if not output.finished:
                        continue
                    number = int(output.request_id)
                    (said,) = cast(RequestOutput, output).outputs
                    # The last token is given out before it goes through the cache.
                    cached = len(requests[number].prompt) + len(said.token_ids) - 1
                    pages = self._books.close(internal[number], cached)
                    first = self._clock.close(internal[number])
                    reply = self._reply(requests[number], said, pages)
                    replies[number] = replace(reply, first_after=first)
                    done(requests[number])
                self._books.note()
        finally:
            engine.abort_request(internal, internal=True)
        return [replies[number] for number in range(len(requests))]

    def _reply(self, request: Request, said: CompletionOutput, pages: Pages) -> Reply:
        token_ids = list(said.token_ids)
        steps: list[dict[int, Logprob]] = [step or {} for step in said.logprobs or ()]
        return Reply(
            generated_text(self._tokenizer, request, token_ids),
            token_ids,
            [
                step[token].logprob
                for step, token in zip(steps, token_ids, strict=bool(steps))
            ],
            [_likeliest(step, request.top or 0) for step in steps],
            pages,
        )

    def close(self) -> None:
        del self._llm, self._books, self._clock
        gc.collect()
        with contextlib.suppress(RuntimeError):
            cleanup_dist_env_and_memory()


class PageBooks:
    """Counts the pages that requests hold, in the pool and not by a formula.

    Pages go back to the pool within the step that ends a request, so the last count is
    taken as they go.
    """

    def __init__(self, manager: HeadPagedManager) -> None:
        self._manager = manager
        self._peak: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._free = manager.free
        manager.free = self._count_and_free  # type: ignore[method-assign]

    def note(self) -> None:
        """Look at every request that holds pages, between two steps."""
        for request_id in self._manager.req_to_blocks:
            self._note(request_id)

    def close(self, request_id: str, tokens: int) -> Pages:
        """What an ended request held, and what ``tokens`` take if none is evicted."""
        return Pages(
            self._held.pop(request_id),
            self._peak.pop(request_id),
            self._manager.rule.full.pages(tokens),
            self._manager.kv_cache_spec.page_size_bytes,
        )

    def _note(self, request_id: str) -> int:
        pages = self._manager.req_to_blocks[request_id]
        # What a dense policy has freed is null in its list.
        held = sum(not page.is_null for page in pages)
        self._peak[request_id] = max(held, self._peak.get(request_id, 0))
        return held

    def _count_and_free(self, request_id: str) -> None:
        if request_id in self._manager.req_to_blocks:
            self._held[request_id] = self._note(request_id)
        self._free(request_id)


class FirstTokens:
    """When requests are let in, and when their first tokens come, step by step."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._step = 0.0
        self._let_in: dict[str, float] = {}
        self._first: dict[str, float] = {}

    def start(self) -> None:
        """A step begins."""
        self._step = time.monotonic()

    def note(self) -> None:
        """A step has ended: look at every request that has not."""
        now = time.monotonic()
        for request_id, request in self._scheduler.requests.items():
            if request.num_computed_tokens:
                self._let_in.setdefault(request_id, self._step)
            if request.num_output_tokens:
                self._first.setdefault(request_id, now)

    def close(self, request_id: str) -> float:
        """Seconds from one to the other, of a request that ended in this step."""
        first = self._first.pop(request_id, None) or time.monotonic()
        return first - self._let_in.pop(request_id, self._step)


def _likeliest(step: dict[int, Logprob], count: int) -> dict[int, float]:
    """Of one step; a chosen token that is not among the likeliest is left out."""
    return {
        token: found.logprob
        for token, found in step.items()
        if found.rank is not None and found.rank <= count
    }


def _sampling(request: Request, protect: bool) -> SamplingParams:
    extra: dict[str, Any] = {}
    if request.forced:
        extra[FORCED_TOKENS] = request.forced
    if protect and request.system:
        extra[PROTECT] = f"0-{request.system}"
    return SamplingParams(
        temperature=0,
        max_tokens=len(request.forced) + request.reply,
        ignore_eos=request.to_the_end,
        stop=["\n"] if request.one_line and not request.forced else None,
        logprobs=request.top,
        extra_args=extra or None,
        # Only stop strings need the engine's own text.
        detokenize=request.one_line and not request.forced,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
