# SPDX-License-Identifier: Apache-2.0
"""The interface of a cache policy.

A policy says, for every KV head of a model, how many tokens it may keep. It works in
tokens and heads alone: pages, slots and kernels are the engine's business. A policy
is a frozen dataclass whose fields are its paper's parameters, so that it is its own
configuration, compares by value and travels between processes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvserve.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """What a policy may know of a model. ``name`` is for messages and profiles."""

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (``G``)."""
        return self.num_query_heads // self.num_kv_heads


@dataclass(frozen=True)
class HeadBudget:
    """What one KV head keeps: everything, or the first and the last tokens.

    ``recent`` is ``None`` for a head that keeps everything. The engine rounds both
    numbers up to whole pages.
    """

    sinks: int = 0
    recent: int | None = None

    @property
    def is_full(self) -> bool:
        return self.recent is None


FULL = HeadBudget()


@dataclass(frozen=True)
class Capabilities:
    """What a policy needs and what it keeps intact, as data.

    The start-up check, ``kvserve policies`` and the tests read this record.
    """

    prefill: Literal["streaming", "dense"]
    """``streaming`` frees pages while the prompt is read, ``dense`` after it."""
    position_only: bool
    """What is kept depends on token positions alone, never on the text."""
    scores_tokens: bool = False
    """Ranks cached tokens by attention."""
    statistics: tuple[str, ...] = ()
    """Attention statistics that the engine must gather."""
    needs_profile: bool = False
    """Reads a file measured on the model beforehand."""
    chunk_invariant: bool = True
    """Cutting the prompt into other chunks changes nothing."""
    prefix_cacheable: bool = False
    """Two requests may share the pages of a common prefix."""
    cuda_graph_safe: bool = False
    tensor_parallel_exact: bool = False


def parameter(
    default: Any,
    description: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare a policy parameter: a dataclass field with a range and a help text."""
    metadata = {"description": description, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Policy(ABC):
    """A cache policy. Subclasses are frozen dataclasses of :func:`parameter` fields."""

    name: ClassVar[str]
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    def budgets(self, model: ModelShape) -> tuple[tuple[HeadBudget, ...], ...]:
        """Decide what every KV head of ``model`` keeps.

        Returns:
            Budgets of shape ``[num_layers][num_kv_heads]``.

        Raises:
            UserError: the policy cannot serve this model.
        """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_range(self.name, field, getattr(self, field.name))


def _check_range(policy: str, field: dataclasses.Field[Any], value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if isinstance(value, float) and value != value:
        raise UserError(f"--policy-arg {field.name}: not a number (policy {policy})")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(
            f"--policy-arg {field.name}={value}: must be {limits} (policy {policy})"
        )
