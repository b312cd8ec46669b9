# SPDX-License-Identifier: Apache-2.0
"""An engine that tests drive step by step and look into."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine import quick_start

PAGE = 32
MIB = 1 << 20

_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": PAGE,
    "enable_prefix_caching": False,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 128 * MIB,
    "max_logprobs": -1,
}


@dataclass
class Reply:
    """What an engine gave for one prompt.

    Attributes:
        best: the chosen and the next best tokens of each step with their log
            probabilities (or logits, if the engine was started so).
        logits: the same for the whole vocabulary, ``[steps, V]``, if asked for.
        preemptions: how often the request lost its pages on the way.
        cached: prompt tokens that it found in the prefix cache.
    """

    tokens: list[int] = field(default_factory=list)
    best: list[dict[int, float]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    preemptions: int = 0
    cached: int = 0
    finish_reason: str | None = None


class Engine:
    """``kvserve.LLM`` in this process; only one can live at a time.

    Args:
        model: model directory.
        policy: a policy's name, or ``None`` for stock vLLM.
        policy_args: the policy's parameters.
        options: vLLM options beside the defaults above.
    """

    def __init__(
        self,
        model: Path,
        policy: str | None,
        policy_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from kvserve import LLM
        from kvserve.engine.devices.hardware import has_gpu

        # vLLM wants as much of a GPU to be free, whatever the pool: others are there.
        on_gpu = {"gpu_memory_utilization": 0.5} if has_gpu() else {}
        with quick_start.starting():
            self._llm = LLM(
                str(model),
                policy=policy,
                policy_args=policy_args,
                **{**_DEFAULTS, **on_gpu, **options},
            )
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._names = itertools.count()
        self.replies: dict[str, Reply] = defaultdict(Reply)
        self._capture()

    @property
    def scheduler(self) -> Any:
        return self._core.scheduler

    @property
    def pool(self) -> Any:
        """The scheduler's pool of pages."""
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def pages_for_requests(self) -> int:
        """Pages that requests can have: all but the null page and scratch."""
        return int(self.pool.num_gpu_blocks) - 1

    @property
    def pages_held(self) -> dict[str, list[int]]:
        """Page ids of every request that holds some."""
        return {
            request: [page.block_id for page in pages]
            for request, pages in self.manager.req_to_blocks.items()
        }

    @property
    def manager(self) -> Any:
        """Who gives pages of the pool to requests."""
        (manager,) = self._managers
        return manager

    @property
    def _managers(self) -> Any:
        """One for each kind of layer, in stock vLLM."""
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def check_books(self) -> None:
        """Check that pool, lists and index agree; stock vLLM has none of ours."""
        from kvserve.engine.scheduling.integrity import check_integrity
        from kvserve.engine.scheduling.manager import HeadPagedManager

        for manager in self._managers:
            if isinstance(manager, HeadPagedManager):
                assert check_integrity(manager, self.scheduler.requests) == []

    @property
    def layers(self) -> dict[str, tuple[Any, Any]]:
        """Layers that cache something and what vLLM would cache, in the model's order.

        A layer that shares another's cache is among them.
        """
        config = self._core.vllm_config
        layers = config.compilation_config.static_forward_context
        return {
            name: (layer, layer.get_kv_cache_spec(config))
            for name, layer in layers.items()
            if hasattr(layer, "get_kv_cache_spec")
        }

    @property
    def builder(self) -> Any:
        """Who builds the rows of each step, in the worker."""
        return self._core.model_executor.driver_worker.worker._builder

    @property
    def model_runner(self) -> Any:
        """vLLM's own, in the worker."""
        return self._core.model_executor.driver_worker.worker.model_runner

    @property
    def rule(self) -> Any:
        """The plan of every request, under a policy with a dense prefill."""
        (group,) = self.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        return group.kv_cache_spec.rule

    def retained(self) -> dict[str, tuple[int, list[list[set[int]]]]]:
        """Tokens computed and positions held of every settled request.

        Positions are ``[num_layers][num_kv_heads]``, as the last step left them.
        """
        tables, state = self.builder.tables, self.builder._selector.state
        settled = tables.settled
        found = {}
        for row, name in enumerate(tables._requests):
            request = self.scheduler.requests.get(name)
            if request is None or name not in settled.lane_of_head:
                continue
            tokens = request.num_computed_tokens
            if tokens <= request.num_prompt_tokens:
                continue
            held = tokens - settled.dropped[:, row]
            lanes = held.clip(max=settled.capacity[:, row])
            found[name] = (
                tokens,
                [
                    [
                        set(
                            state.position[torch.from_numpy(pages.astype("int64"))]
                            .flatten()[: lanes[layer, head]]
                            .tolist()
                        )
                        for head, pages in enumerate(tables.by_slot[layer, row])
                    ]
                    for layer in range(len(lanes))
                ],
            )
        return found

    @property
    def is_busy(self) -> bool:
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def gauge(self, name: str) -> float:
        """Read a Prometheus gauge; the engine must keep statistics."""
        values = [m.value for m in self._llm.get_metrics() if m.name == name]
        return float(values[-1])

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        adapter: Path | None = None,
        **sampling: Any,
    ) -> str:
        """Queue a greedy request, unless ``sampling`` says otherwise; name it."""
        from vllm import SamplingParams

        params = SamplingParams(
            **{
                "temperature": 0.0,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "logprobs": 5,
                **sampling,
            }
        )
        return str(
            self._llm.llm_engine.add_request(
                str(next(self._names)),
                {"prompt_token_ids": list(prompt)},
                params,
                lora_request=adapter and _adapter(adapter),
            )
        )

    def abort(self, name: str) -> None:
        self._llm.llm_engine.abort_request([name], internal=True)

    def preempt_all(self) -> None:
        """Take every page from every running request; the next step starts anew."""
        self._llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    def step(self) -> None:
        self._llm.llm_engine.step()

    def finish(self) -> None:
        """Step until every request is done."""
        while self.is_busy:
            self.step()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any
    ) -> list[Reply]:
        """Run all prompts together."""
        names = [self.add(prompt, max_tokens, **sampling) for prompt in prompts]
        self.finish()
        return [self.replies.pop(name) for name in names]

    def beams(
        self, prompt: Sequence[int], width: int, max_tokens: int
    ) -> list[list[int]]:
        """Search for the likeliest replies; return them with their prompt, best first.

        Every step of every beam is a request of its own.
        """
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(
            beam_width=width, max_tokens=max_tokens, ignore_eos=True
        )
        prompts = [{"prompt_token_ids": list(prompt)}]
        (found,) = self._llm.beam_search(prompts, params)
        return [list(beam.tokens) for beam in found.sequences]

    def close(self) -> None:
        """Free the engine, so that another one can start."""
        with quick_start.closing(), contextlib.suppress(ImportError):
            del self._llm, self._core
            gc.collect()
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _capture(self) -> None:
        """Note what the scheduler reports of each step, before vLLM makes text of it.

        Full-vocabulary log probabilities are taken out on the way: as Python objects
        they would take seconds a step.
        """
        client = self._llm.llm_engine.engine_core
        get_output = client.get_output
        requests = self.scheduler.requests
        preemptions: dict[str, int] = {}

        def captured() -> Any:
            outputs = get_output()
            preemptions.update({k: r.num_preemptions for k, r in requests.items()})
            for output in outputs.outputs:
                reply = self.replies[output.request_id]
                reply.tokens += output.new_token_ids
                reply.preemptions = preemptions.get(output.request_id, 0)
                if output.prefill_stats is not None:
                    reply.cached = output.prefill_stats.num_cached_tokens
                if output.finish_reason is not None:
                    reply.finish_reason = str(output.finish_reason)
                _note_logprobs(reply, output)
            return outputs

        client.get_output = captured


def _note_logprobs(reply: Reply, output: Any) -> None:
    lists = output.new_logprobs
    if lists is None:
        return
    for ids, values in zip(lists.logprob_token_ids, lists.logprobs, strict=True):
        if len(ids) > 100:
            # The chosen token comes first, then all tokens in order of rank.
            row = torch.full((len(ids) - 1,), float("nan"))
            row[torch.from_numpy(ids.astype("int64"))] = torch.from_numpy(values)
            reply.logits.append(row)
            output.new_logprobs = None
        else:
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            reply.best.append(dict(pairs))


def _adapter(folder: Path) -> Any:
    from vllm.lora.request import LoRARequest

    number = zlib.crc32(str(folder).encode())
    return LoRARequest(folder.name, number, str(folder))


class EngineSlot:
    """The one living engine: asking for another closes it, for the same keeps it."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._key: tuple[Any, ...] = ()

    def start(
        self,
        model: Path,
        policy: str | None,
        policy_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> Engine:
        """Return an idle engine with these settings."""
        key = (model, policy, policy_args, options)
        self.check_books()
        if self._engine is None or key != self._key or self._engine.is_busy:
            self.close()
            self._engine = Engine(model, policy, policy_args, **options)
            self._key = key
        return self._engine

    def check_books(self) -> None:
        """Check those of the living engine, whatever has become of its requests."""
        if self._engine is not None:
            self._engine.check_books()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def random_prompts(lengths: Sequence[int], vocab: int, seed: int) -> list[list[int]]:
    """Make prompts of these lengths, without the first tokens: some are special."""
    source = random.Random(seed)
    return [[source.randrange(8, vocab) for _ in range(n)] for n in lengths]


def write_profile(path: Path, layers: int, heads: int) -> Path:
    """Write a retrieval profile that ranks heads at random."""
    source = random.Random(layers * 1000 + heads)
    scores = [[source.random() for _ in range(heads)] for _ in range(layers)]
    path.write_text(
        json.dumps({"format": "kvserve-retrieval/1", "kv_head_scores": scores})
    )
    return path
