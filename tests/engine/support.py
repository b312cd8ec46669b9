# SPDX-License-Identifier: Apache-2.0
"""What is served of each structure of a cache: one table, for tests and for a page.

``scripts/write_support_matrix.py`` writes docs/models.md from it, and
tests/engine/test_support.py asks start-up checks whether it is true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.engine.families import FAMILIES
from tests.reference.families import Family

YES, NO = "yes", "no"
STATES = ("mamba2", "gdn_attn", "short_conv")


@dataclass(frozen=True)
class Structure:
    """A structure of a cache, and what works on it, where its families are served.

    Attributes:
        name: in words.
        marks: of which a layer's kind has one, in :class:`Family`.
        selecting: whether policies that select are served.
        prefix_caching: whether requests may share pages.
        quantised: whether pages may hold fewer bits.
        ranks: whether several ranks may share the heads of a layer.
        gpu: what became of it on a GPU.
        instead: what to say if no policy is served.
    """

    name: str
    marks: tuple[str, ...]
    selecting: bool = True
    prefix_caching: bool = True
    quantised: bool = True
    ranks: bool = True
    gpu: str = "not run"
    instead: str = ""

    @property
    def families(self) -> list[Family]:
        """Rows of the table of families that have it."""
        return [family for family in FAMILIES if self.has(family)]

    def has(self, family: Family) -> bool:
        pattern = re.compile(rf"(^|, )({'|'.join(self.marks)})( |,|$)")
        return any(pattern.search(kind) for kind in family.kinds)


@dataclass(frozen=True)
class Plain(Structure):
    """Layers that are all alike, and see everything."""

    def has(self, family: Family) -> bool:
        return set(family.kinds) == {"full"}


@dataclass(frozen=True)
class Unequal(Structure):
    """Layers whose heads differ in number or size, which their kinds do not tell."""

    def has(self, family: Family) -> bool:
        return "global_head_dim" in family.values


STRUCTURES = [
    Plain("every token", ()),
    Structure("a window", ("window",)),
    Structure("a chunk", ("chunk",), selecting=False),
    Structure("sinks in the softmax", ("sink",)),
    Structure("soft caps", ("cap",)),
    Structure("ALiBi", ("alibi",)),
    Structure("states", STATES, prefix_caching=False),
    Structure("another layer's cache", ("shares",)),
    Unequal(
        "unequal heads",
        (),
        selecting=False,
        prefix_caching=False,
        quantised=False,
        ranks=False,
        gpu="refused",
    ),
    Structure(
        "a latent vector (MLA)",
        ("latent",),
        instead="stock vLLM's own replies depend on the batch here",
    ),
]


COLUMNS = [
    "layers keep or see",
    "families",
    "CPU",
    "GPU",
    "policies of positions",
    "policies that select",
    "prefix caching",
    "quantised pages",
    "tensor parallel",
]


def rows() -> list[list[str]]:
    """Lay the table out: structures that are served, then those that are refused."""
    served = [one for one in FAMILIES if one.served]
    refused = [one for one in FAMILIES if not one.served]
    taken = [(one, [*filter(one.has, served)]) for one in STRUCTURES]
    blocked = [(one, [f for f in refused if one in _reasons(f)]) for one in STRUCTURES]
    return [
        *(_served(one, families) for one, families in taken if families),
        *(_refused(one, families) for one, families in blocked if families),
    ]


def _reasons(family: Family) -> list[Structure]:
    """Name the structures for which a family is refused: what no served one has."""
    found = [one for one in STRUCTURES if one.has(family)]
    reasons = [one for one in found if not any(f.served for f in one.families)]
    return reasons or found[-1:]


def _served(structure: Structure, families: list[Family]) -> list[str]:
    takes = (
        True,
        structure.selecting,
        structure.prefix_caching,
        structure.quantised,
        structure.ranks,
    )
    found = [YES if one else NO for one in takes]
    return [structure.name, _names(families), YES, structure.gpu, *found]


def _refused(structure: Structure, families: list[Family]) -> list[str]:
    why = f"refused: {structure.instead}" if structure.instead else "refused"
    return [structure.name, _names(families), why, "refused", *["-"] * 5]


def _names(families: list[Family]) -> str:
    return ", ".join(family.name for family in families)
