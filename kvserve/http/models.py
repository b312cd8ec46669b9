# SPDX-License-Identifier: Apache-2.0
"""Bodies of the routes, as OpenAPI describes them.

An *entry* is what one KV head of one layer keeps of one token; matrices are
``[num_layers][num_kv_heads]``. "Full" is what a cache that evicts nothing would hold
for the same requests.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorInfo(Body):
    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(Body):
    error: ErrorInfo


class Served(Body):
    """The model, as far as its cache is concerned."""

    name: str = Field(examples=["SmolLM2-135M-Instruct"])
    num_layers: int = Field(examples=[30])
    num_query_heads: int = Field(examples=[9])
    num_kv_heads: int = Field(examples=[3])
    head_size: int = Field(examples=[64])
    max_tokens: int = Field(description="Longest request.", examples=[8192])


class Profile(Body):
    """Where a file that the policy reads comes from."""

    parameter: str = Field(examples=["profile"])
    path: str = Field(
        examples=["policies/profiles/SmolLM2-135M-Instruct/retrieval.json"]
    )
    sha256: str
    facts: dict[str, Any] = Field(
        description="What the file says of itself, scores left out.",
        examples=[{"format": "kvserve-retrieval/1", "model": "SmolLM2-135M-Instruct"}],
    )


class Budgets(Body):
    """What every KV head keeps of a request of ``context`` tokens."""

    context: int = Field(examples=[8192])
    rows: Literal["heads", "lanes"] = Field(
        description="`lanes`: the text decides which head of a layer gets which lane.",
        examples=["heads"],
    )
    retained: list[list[int]] = Field(
        description="Tokens that each keeps.", examples=[[[8192, 512, 512]]]
    )
    sinks: list[list[int]] | None = Field(
        default=None,
        description="First tokens, by position; none for policies that look at text.",
        examples=[[[0, 32, 32]]],
    )
    recent: list[list[int | None]] | None = Field(
        default=None,
        description="Last tokens, likewise; null for heads that keep everything.",
        examples=[[[None, 480, 480]]],
    )
    group: int | None = Field(
        default=None,
        description="Tokens that are judged together when they leave the window, under "
        "policies that thin.",
        examples=[128],
    )
    keep: list[list[int | None]] | None = Field(
        default=None,
        description="How many of each group stay; null for heads that do not thin.",
        examples=[[[None, 12, 0]]],
    )


class Level(Body):
    """A budget of a range, and what the policy makes of it."""

    budget: str = Field(examples=["35.36%"])
    arguments: dict[str, Any]
    kept: float = Field(
        description="Share of the full cache at `context` tokens.", examples=[0.35]
    )


class PolicyBody(Body):
    object: Literal["kv.policy"] = "kv.policy"
    policy: str = Field(
        description="`none` is stock vLLM; then all else is null.",
        examples=["retrieval"],
    )
    arguments: dict[str, Any] | None = Field(
        default=None, examples=[{"full_ratio": 0.2, "sinks": 32, "recent": 480}]
    )
    summary: str | None = Field(
        default=None,
        examples=["of 90 KV heads 18 keep everything; 72 keep 32 sinks + 480 recent"],
    )
    source: str | None = Field(
        default=None, examples=["DuoAttention, arXiv 2410.10819"]
    )
    capabilities: dict[str, Any] | None = Field(
        default=None, examples=[{"prefill": "streaming", "position_only": True}]
    )
    model: Served | None = None
    page_tokens: int | None = Field(
        default=None, description="Tokens of a page.", examples=[32]
    )
    page_bytes: int | None = Field(default=None, examples=[8192])
    kv_cache_dtype: str | None = Field(
        default=None,
        description="What pages hold of a number.",
        examples=["bfloat16", "int8_per_token_head"],
    )
    scratch_pages: int | None = Field(
        default=None, description="Pages that prefill keeps for itself.", examples=[864]
    )
    budgets: Budgets | None = None
    profiles: list[Profile] | None = None
    request_policies: bool | None = Field(
        default=None,
        description="Whether a request may name a policy of its own, as `kv_policy` "
        "in `vllm_xargs`.",
        examples=[False],
    )
    levels: list[Level] | None = Field(
        default=None,
        description="Of a range of budgets, the largest first; all else here is of the "
        "least. Null where there is one budget.",
    )
    protect: str | None = Field(
        default=None,
        description="Whose tokens are protected from eviction: `system`, the system "
        "prompts of all chats; `requests`, what they name as `kv_protect` in "
        "`vllm_xargs`; null: nobody's.",
        examples=["system"],
    )


class Pages(Body):
    total: int = Field(description="What requests can have.", examples=[32000])
    held: int = Field(examples=[5120])
    free: int = Field(examples=[26880])
    dense_prefill: int = Field(
        description="Held by requests that keep all till their prompt is read.",
        examples=[0],
    )
    spared: int = Field(
        description="That would be held besides if requests shared no prefixes.",
        examples=[1800],
    )


class Bytes(Body):
    held: int = Field(examples=[41943040])
    full: int = Field(examples=[146800640])
    saved: int = Field(examples=[104857600])


class Running(Body):
    """A running request."""

    request_id: str = Field(examples=["chatcmpl-6f1e-1a2b3c4d"])
    prompt_tokens: int = Field(examples=[4096])
    tokens_seen: int = Field(examples=[4160])
    entries_retained: int = Field(examples=[112000])
    pages_held: int = Field(examples=[3510])
    dense_prefill: bool = Field(examples=[False])
    policy: str = Field(description="Its policy's name.", examples=["retrieval"])


class BudgetUse(Body):
    """Requests with one budget of a range."""

    budget: str = Field(examples=["35.36%"])
    running: int = Field(description="That hold pages.", examples=[3])
    begun: int = Field(description="That began with it, ever.", examples=[120])


class Cache(Body):
    """What running requests hold."""

    pages: Pages
    bytes: Bytes
    compression_ratio: float = Field(
        description="Full over held bytes; 1 when nothing runs.", examples=[3.5]
    )
    entries_seen: int = Field(examples=[374400])
    entries_retained: int = Field(examples=[112000])
    retained_by_head: list[list[int]] = Field(
        description="Entries of every KV head.", examples=[[[4160, 512, 512]]]
    )
    entries_evicted: int = Field(description="Since the start.", examples=[262400])
    evictions_per_second: float = Field(examples=[2750.0])
    selection_seconds: float = Field(description="Since the start.", examples=[0.0])
    compaction_seconds: float = Field(description="Since the start.", examples=[0.4])
    requests: list[Running]
    budgets: list[BudgetUse] | None = Field(
        default=None,
        description="Of a range, the largest first; null where there is one budget.",
    )


class Latency(Body):
    """A histogram's sum and count; the mean is one over the other."""

    sum: float = Field(description="Seconds.", examples=[12.5])
    count: int = Field(examples=[80])


class Traffic(Body):
    """vLLM's own counters since the start, over all API processes."""

    prompt_tokens: int = Field(examples=[81920])
    generation_tokens: int = Field(examples=[10240])
    requests_finished: int = Field(examples=[80])
    preemptions: int = Field(examples=[0])
    prefix_queries: int = Field(
        description="Tokens of prompts that were looked up in the prefix cache.",
        examples=[81920],
    )
    prefix_hits: int = Field(
        description="Those that were found, and not read again.", examples=[61440]
    )
    time_to_first_token: Latency
    inter_token_latency: Latency


class Integrity(Body):
    """Whether pool, page lists, books and prefix index agree with each other."""

    sound: bool
    faults: list[str] = Field(
        description="A line for each, a hundred at most of an engine.",
        examples=[["page 7: neither free nor in a list"]],
    )


class Stats(Body):
    object: Literal["kv.stats"] = "kv.stats"
    time: float = Field(description="Seconds since 1970.", examples=[1790000000.0])
    policy: str = Field(examples=["retrieval"])
    running: int = Field(examples=[8])
    waiting: int = Field(examples=[0])
    draining: bool = Field(examples=[False])
    cache: Cache | None = Field(default=None, description="Null for stock vLLM.")
    traffic: Traffic | None = Field(
        default=None, description="Null under --disable-log-stats."
    )
    integrity: Integrity | None = Field(
        default=None, description="With `check=1`; null for stock vLLM."
    )


class Receipt(Body):
    """What one sequence held when it gave its pages back."""

    request_id: str = Field(
        description="The engine's name of it.", examples=["chatcmpl-6f1e-1a2b3c4d"]
    )
    finished: float = Field(description="Seconds since 1970.", examples=[1790000000.0])
    tokens_seen: int = Field(
        description="Tokens that went through the cache, prompt and reply.",
        examples=[4160],
    )
    entries_seen: int = Field(examples=[374400])
    entries_retained: int = Field(examples=[112000])
    entries_evicted: int = Field(examples=[262400])
    pages_held: int = Field(description="At the end.", examples=[3510])
    pages_peak: int = Field(description="The most it ever held.", examples=[3510])
    pages_full: int = Field(examples=[11700])
    policy: str = Field(
        default="", description="Its policy's name.", examples=["sink-recent"]
    )
    arguments: str = Field(
        default="",
        description="Arguments of its policy that are not the defaults.",
        examples=["recent=480"],
    )
    protected: str = Field(
        default="",
        description="Spans of tokens, first and first behind, that it had protected; "
        "they stay in heads that keep tokens by position, and go last in those that "
        "are thinned.",
        examples=["0-71"],
    )
    tokens_cached: int = Field(
        default=0,
        description="Tokens that were read already when it last began: the cached "
        "prefix.",
        examples=[3040],
    )


class RequestReceipt(Receipt):
    """Totals of a request, and the receipt of each of its sequences."""

    object: Literal["kv.receipt"] = "kv.receipt"
    sequences: list[Receipt]


class Receipts(Body):
    object: Literal["list"] = "list"
    data: list[Receipt] = Field(description="The last to end first.")
    has_more: bool


class PlanLevel(Body):
    """What a request costs with one budget of a range."""

    budget: str = Field(examples=["35.36%"])
    pages: int = Field(examples=[4077])
    pages_peak: int = Field(examples=[4077])
    bytes: int = Field(examples=[33398784])
    kept: float = Field(examples=[0.354])
    requests_fit: int = Field(examples=[7])


class PlanBody(Body):
    """What a request of ``context`` tokens costs, and how many fit."""

    object: Literal["kv.plan"] = "kv.plan"
    context: int = Field(examples=[4096])
    pages: int = Field(description="At the end.", examples=[3456])
    pages_peak: int = Field(description="The most on the way.", examples=[3456])
    pages_full: int = Field(examples=[11520])
    bytes: int = Field(examples=[28311552])
    bytes_full: int = Field(examples=[94371840])
    kept: float = Field(description="Share of the full cache.", examples=[0.3])
    pool_pages: int = Field(examples=[32000])
    requests_fit: int = Field(
        description="That many run at once without preemption.", examples=[9]
    )
    requests_fit_full: int = Field(
        description="The same of a cache that evicts nothing.", examples=[2]
    )
    levels: list[PlanLevel] | None = Field(
        default=None,
        description="Of a range of budgets, the largest first; all else here is of the "
        "least. Null where there is one budget.",
    )
