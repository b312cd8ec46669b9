# SPDX-License-Identifier: Apache-2.0
"""The interface of a cache policy.

A policy says what every KV head of a model keeps. It works in tokens and heads alone:
pages, slots and kernels are the engine's business. A policy is a frozen dataclass
whose fields are its paper's parameters, so that it is its own configuration, compares
by value and travels between processes.

* A :class:`StreamingPolicy` decides by position: which first and last tokens a head
  keeps. Pages are freed while the prompt is read.
* A :class:`DensePolicy` decides by content, once the whole prompt is read with full
  attention: how many tokens each lane of a layer keeps is a function of the prompt's
  length, which tokens and for which head is a function of attention.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from kvserve.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Local:
    """What the queries of a layer may see by the model itself, if not everything.

    Attributes:
        tokens: The last so many, a query's own included.
        is_chunk: Of these only the ones in its own chunk: behind the last position
            that is a multiple of ``tokens``.
    """

    tokens: int
    is_chunk: bool = False

    def __str__(self) -> str:
        return f"a {'chunk' if self.is_chunk else 'window'} of {self.tokens} tokens"


@dataclass(frozen=True)
class ModelShape:
    """What a policy may know of a model and of how it is served.

    ``name`` is for messages and profiles. ``max_tokens`` is the longest request that
    the server takes, prompt and reply. ``pattern`` has the entries of the model's
    configuration that declare a sparse attention pattern which it was trained with.
    ``local`` says of each layer what its queries may see, or is empty if that is
    everything in all of them. A policy decides on the others alone: it is given
    :attr:`open`, whose layers are number ``chosen`` of the model's ``all_layers``.
    Layers are those with a cache of their own; ``reread`` are the ones whose cache
    further layers read too. Where layers have heads of unequal number or size,
    ``layer_heads`` says both of each; ``head_size`` is then the largest, and
    ``num_kv_heads`` is as many as lie in pages of their own in any layer.
    """

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    max_tokens: int = 1 << 20
    pattern: tuple[tuple[str, Any], ...] = ()
    local: tuple[Local | None, ...] = ()
    chosen: tuple[int, ...] | None = None
    all_layers: int = 0
    reread: tuple[int, ...] = ()
    layer_heads: tuple[tuple[int, int], ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (``G``)."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def local_by_layer(self) -> tuple[Local | None, ...]:
        """What the queries of each layer see; ``None``: everything."""
        return self.local or (None,) * self.num_layers

    @property
    def open(self) -> ModelShape:
        """The layers that a policy decides on: their queries may see everything."""
        if not any(self.local):
            return self
        chosen = tuple(i for i, local in enumerate(self.local) if local is None)
        heads = self.num_kv_heads, self.head_size
        if self.layer_heads and chosen:
            heads = self.layer_heads[chosen[0]]
        return dataclasses.replace(
            self,
            num_layers=len(chosen),
            num_kv_heads=heads[0],
            head_size=heads[1],
            layer_heads=(),
            local=(),
            chosen=chosen,
            all_layers=self.num_layers,
        )

    def up_to(self, tokens: int) -> ModelShape:
        """The model of a server whose longest request has so many tokens.

        A window or chunk that no request outgrows is everything.
        """
        local = tuple(
            one if one and one.tokens < tokens else None for one in self.local
        )
        local = local if any(local) else ()
        return dataclasses.replace(self, max_tokens=tokens, local=local)

    def own(self, by_layer: Sequence[T]) -> Sequence[T]:
        """Pick what belongs to these layers of something for each of the model's."""
        if self.chosen is None or len(by_layer) != self.all_layers:
            return by_layer
        return [by_layer[layer] for layer in self.chosen]


@dataclass(frozen=True)
class HeadBudget:
    """What one KV head keeps: everything, or some tokens by their positions.

    Attributes:
        sinks: First tokens, rounded up to whole pages.
        recent: Last tokens, likewise; ``None`` for a head that keeps everything.
        stride: Behind the sinks, pages are counted in turns of so many.
        shards: Of each turn, the places of pages that stay for good.
        group: Behind the sinks, tokens are counted in groups of so many, in whole
            pages; a group that has left the window is thinned. 0: there are none, and
            what leaves the window is gone.
        keep: Tokens of each group that stay, those of the highest scores.
    """

    sinks: int = 0
    recent: int | None = None
    stride: int = 1
    shards: frozenset[int] = frozenset()
    group: int = 0
    keep: int = 0

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
    elastic: bool = False
    """What is kept grows with the length that a request may reach."""
    prefix_cacheable: bool = False
    """Two requests may share the pages of a common prefix."""
    cuda_graph_safe: bool = False
    tensor_parallel_exact: bool = False
    """A head keeps the same whatever other heads of its layer see or keep, so that
    ranks which own a part of the heads keep what one rank with all of them does."""


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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_range(self.name, field, getattr(self, field.name))

    def files(self, model_name: str) -> dict[str, Path]:
        """The files that the policy reads, by the parameter that names them.

        A text that names a file is taken for one.

        Args:
            model_name: for which a file may ship that nobody names.
        """
        texts = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        paths = {k: Path(v).expanduser() for k, v in texts.items() if _is_text(v)}
        return {key: path for key, path in paths.items() if path.is_file()}

    @property
    def page_size(self) -> int | None:
        """Tokens of a page, for a policy that thinks in blocks of its own."""
        return None


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """A policy that decides by position alone."""

    def remark(self, model: ModelShape) -> str:
        """Say, when the server starts, what its user should know; may be empty."""
        return ""

    @abstractmethod
    def budgets(
        self, model: ModelShape, tokens: int
    ) -> tuple[tuple[HeadBudget, ...], ...]:
        """Decide what every KV head of ``model`` keeps.

        Args:
            tokens: What a request may reach, prompt and longest reply, if the record
                says ``elastic``; else ``model.max_tokens``. A larger number must not
                make a smaller budget.

        Returns:
            Budgets of shape ``[num_layers][num_kv_heads]``.

        Raises:
            UserError: the policy cannot serve this model.
        """


Tail = Literal["append", "ring", "heavy"]
"""What becomes of generated tokens: ``append`` keeps them all; a full ``ring`` writes
over the oldest of the last ``recent`` tokens, a full ``heavy`` over the token outside
of the last ``recent`` that has drawn the least attention."""


@dataclass(frozen=True)
class Lane:
    """What one lane of a layer keeps after a dense prefill.

    Attributes:
        keep: Prompt tokens that it keeps.
        tail: What becomes of generated tokens.
        recent: Last tokens that are safe; for ``ring`` and ``heavy`` only.
        limit: Tokens from which a lane evicts, if more than it keeps. A ``heavy`` lane
            holds one more, for each token takes part in the attention of its own step.
    """

    keep: int
    tail: Tail = "append"
    recent: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Prompt:
    """What one layer knows when the last token of a prompt has been attended to.

    Attributes:
        keys, values: Of all ``N`` tokens, ``[H_kv, N, d]``, float32.
        queries: Of the last ``L`` tokens, ``[H_q, L, d]``, float32; ``L`` is the
            policy's ``observation_window`` or ``N`` if that is less.
        scale: Factor of logits.
        mass: Attention that each token received from all queries, the sum over the
            query heads of a group, ``[H_kv, N]``, float32; ``None`` for policies
            whose record does not ask for it.
        weigh: What the model makes of scaled products ``[H_kv, G, L, N]``, and of which
            of the last keys lie in a query's future, bool ``[L, L]``: weights of the
            same shape; ``None`` if that is a softmax alone.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    mass: Tensor | None = None
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class Selection:
    """What the lanes of one layer keep, lane by lane.

    Attributes:
        head_of_lane: KV head that owns each lane: a permutation.
        positions: Prompt positions that each lane keeps, ascending, ``keep`` of them.
    """

    head_of_lane: list[int]
    positions: list[Tensor]


@dataclass(frozen=True)
class DensePolicy(Policy):
    """A policy that reads the prompt with full attention and then selects."""

    @property
    def observation_window(self) -> int:
        """Last queries of the prompt that :meth:`select` looks at."""
        return 0

    @property
    def mass_per_query(self) -> bool:
        """Whether ``heavy`` lanes divide mass by the queries that saw a token."""
        return False

    @abstractmethod
    def lanes(self, model: ModelShape, tokens: int) -> tuple[tuple[Lane, ...], ...]:
        """Size the lanes of a prompt of ``tokens`` tokens.

        A pure function, for the scheduler counts pages by it and the worker fills
        them. A prompt that is kept whole has lanes of ``Lane(tokens)``.

        Returns:
            Lanes of shape ``[num_layers][num_kv_heads]``.

        Raises:
            UserError: the policy cannot serve this model.
        """

    @abstractmethod
    def select(
        self, model: ModelShape, layer: int, prompt: Prompt, lanes: tuple[Lane, ...]
    ) -> Selection:
        """Choose what the lanes of one layer keep.

        Args:
            layer: Index of the layer.
            lanes: What :meth:`lanes` gave for it.
        """


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


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
