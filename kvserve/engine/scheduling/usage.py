# SPDX-License-Identifier: Apache-2.0
"""What running requests hold, added up from the scheduler's books and the worker's."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvserve.engine.scheduling.manager import HeadPagedManager
from kvserve.plan.lanes import IntArray
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import level_of, names_policy


@dataclass(frozen=True)
class WorkerUsage:
    """What only a worker knows.

    Attributes:
        selection_seconds: spent on choosing what survives.
        compaction_seconds: spent on moving what does.
        lane_of_head: each head's lane in its layer, ``[num_layers, num_kv_heads]``, of
            requests whose lanes a dense policy has given out.
    """

    selection_seconds: float
    compaction_seconds: float
    lane_of_head: dict[str, IntArray]


def cache_usage(
    manager: HeadPagedManager,
    requests: dict[str, Any],
    workers: Sequence[WorkerUsage],
) -> dict[str, Any]:
    """Add up what running requests hold.

    Args:
        requests: vLLM's requests by name, for prompts and what they ask for.
        workers: one for each rank, in order.

    Returns:
        Plain numbers and lists; ``http/cache_report.py`` makes an object of them.
    """
    full, ledger, copies = manager.rule.full, manager.ledger, manager.rule.copies
    by_head = np.zeros((full.num_layers, full.num_kv_heads * copies), dtype=np.int64)
    # Most requests share a plan; its lanes are worked out once for each length.
    seen: dict[tuple[int, int], IntArray] = {}
    totals: dict[str, int] = defaultdict(int)
    rows = []
    for name, tokens in ledger.tokens.items():
        plan = manager.plan_of(name)
        key = id(plan), tokens
        if key not in seen:
            seen[key] = plan.lane_tokens(tokens)
        lanes = seen[key]
        by_head += np.hstack(
            [
                _of_heads(lanes, worker.lane_of_head.get(name))
                for worker in workers[:copies]
            ]
        )
        held, retained = manager.pages_held(name), int(lanes.sum()) * copies
        reads = plan.is_reading(tokens)
        totals["entries_seen"] += int(full.lane_tokens(tokens).sum()) * copies
        totals["dense_prefill_pages"] += held if reads else 0
        rows.append(
            {
                "request_id": name,
                "prompt_tokens": requests[name].num_prompt_tokens,
                "tokens_seen": tokens,
                "entries_retained": retained,
                "pages_held": held,
                "dense_prefill": reads,
                "policy": manager.policy_of(name).name,
            }
        )
    retained = int(by_head.sum())
    return {
        "page_bytes": manager.kv_cache_spec.page_size_bytes,
        "pages_full": _pages_full(manager, requests),
        "dense_prefill_pages": totals["dense_prefill_pages"],
        "entries_seen": totals["entries_seen"],
        "entries_retained": by_head.tolist(),
        "entries_evicted": ledger.evicted(totals["entries_seen"] - retained),
        "selection_seconds": max(one.selection_seconds for one in workers),
        "compaction_seconds": max(one.compaction_seconds for one in workers),
        "requests": rows,
        "ended": _ended(manager),
        "budgets": _budgets(manager, requests),
    }


def _pages_full(manager: HeadPagedManager, requests: dict[str, Any]) -> int:
    """Pages of a cache that evicts nothing; it would share prefixes where ours does."""
    full, held = manager.rule.full, manager.ledger.tokens
    pages = sum(full.pages(tokens) for tokens in held.values())
    if not manager.rule.is_shared:
        return pages
    size, longest = manager.block_size, manager.rule.max_tokens
    named = [requests[name].block_hashes[: held[name] // size] for name in held]
    again = sum(map(len, named)) - len(set().union(*named))
    # The model's own windows hold pages of their own for each request.
    a_block = full.pages(longest) - full.pages(max(longest - size, 0))
    return pages - again * a_block


def _ended(manager: HeadPagedManager) -> dict[str, dict[str, int]] | None:
    """What requests that ended had seen and kept, where policies are mixed."""
    if not manager.rule.mixed:
        return None
    totals = manager.ledger.ended.items()
    return {policy: dataclasses.asdict(ended) for policy, ended in totals}


def _budgets(
    manager: HeadPagedManager, requests: dict[str, Any]
) -> list[dict[str, int]] | None:
    """Requests that run and that began with each budget of a range, if there is one."""
    rule, ledger = manager.rule, manager.ledger
    if not (isinstance(rule, MixedRule) and rule.levels):
        return None
    params = [requests[name].sampling_params for name in ledger.tokens]
    running = Counter(
        level_of(rule, one) for one in params if not names_policy(rule, one)
    )
    return [
        {"running": running[level], "begun": ledger.given[level]}
        for level in range(len(rule.levels))
    ]


def _of_heads(lanes: IntArray, lane_of_head: IntArray | None) -> IntArray:
    """Turn tokens of lanes into tokens of heads.

    Lanes are heads, unless a policy deals them out when it has read the prompt.
    """
    if lane_of_head is None:
        return lanes
    heads: IntArray = np.take_along_axis(lanes, lane_of_head, axis=1)
    return heads
