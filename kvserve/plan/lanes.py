# SPDX-License-Identifier: Apache-2.0
"""Which blocks a lane keeps, and in which slot each of them lives, in closed form.

A lane has ``s`` sink blocks and sees its last ``w`` blocks; a full lane keeps them all.
Behind the sinks, blocks are counted in *turns* of ``stride``, and those in the lane's
shards stay for good like sinks. All other blocks are *passing*: they leave when the
window does. The lane holds its last ``ring`` passing blocks, as many as a window can
hold, and a passing block lives where the one ``ring`` passing blocks before it lived.

The window of an *aligned* lane does not slide: a query sees from the last multiple of
``w`` blocks on.

Behind the sinks of a *thinned* lane, blocks are counted in groups. A query sees the
sinks, ``keep`` tokens of each group that lies wholly in front of its last ``w`` blocks,
packed into history pages, and from there on everything. Between history and the blocks
that follow it is a *gap*, what is left of the last history page.

A slot is named after the block that opened it. In lanes that do not recycle slots every
block opens its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
PageArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

_NEVER = 1 << 40
"""More passing blocks than any request has: a ring that never comes round."""


@dataclass(frozen=True)
class Lanes:
    """Lanes as arrays of one shape ``S``; blocks are given as ``[*S, n]``.

    Arguments need only broadcast to ``[*S, n]``, and so do results.

    Attributes:
        sinks: sink blocks, ``S``.
        window: last blocks that a query sees, its own included; 0 for a full lane.
        ring: passing blocks that the lane holds.
        turn: passing blocks of each turn.
        before: passing blocks among the first ``r`` of a turn, ``[*S, stride + 1]``.
        passing: places in the turn of its passing blocks, ``[*S, stride]``, padded.
        staying: the same of blocks that stay.
        aligned: whether the window begins at a multiple of its length, ``S``.
        present: whether there is such a lane, ``S``: layers may have fewer than others.
        group: blocks of a group, ``S``; 0 where the lane is not thinned.
        keep: tokens that stay of a group, ``S``.
        page_size: tokens of a page, if lanes may be thinned; else 0.
    """

    sinks: IntArray
    window: IntArray
    ring: IntArray
    turn: IntArray
    before: IntArray
    passing: IntArray
    staying: IntArray
    aligned: BoolArray
    present: BoolArray
    group: IntArray
    keep: IntArray
    page_size: int = 0

    @classmethod
    def make(
        cls,
        sinks: IntArray,
        window: IntArray,
        stays: BoolArray,
        recycles: bool = True,
        aligned: BoolArray | None = None,
        present: BoolArray | None = None,
    ) -> Lanes:
        """Make lanes of sinks and window.

        Args:
            stays: which blocks of a turn are the lane's shards, ``[*S, stride]``.
            recycles: whether a block is written over one that has left.
        """
        stays = stays | (window == 0)[..., None]
        passes = ~stays
        before = np.zeros((*stays.shape[:-1], stays.shape[-1] + 1), dtype=np.int64)
        before[..., 1:] = passes.cumsum(axis=-1)
        turn = before[..., -1]
        return cls(
            sinks,
            window,
            _most_in_window(before, window)
            if recycles
            else np.full_like(window, _NEVER),
            turn,
            before,
            # A stable sort puts the places of one kind first, in order.
            np.argsort(stays, axis=-1, kind="stable"),
            np.argsort(passes, axis=-1, kind="stable"),
            np.zeros(window.shape, dtype=bool) if aligned is None else aligned,
            np.ones(window.shape, dtype=bool) if present is None else present,
            np.zeros_like(window),
            np.zeros_like(window),
        )

    def thinned(self, group: IntArray, keep: IntArray, page_size: int) -> Lanes:
        """The same lanes, which keep ``keep`` tokens of every ``group`` blocks.

        Args:
            group, keep: as the attributes.
        """
        return replace(self, group=group, keep=keep, page_size=page_size)

    @classmethod
    def full(cls, shape: tuple[int, ...], stride: int = 1) -> Lanes:
        """Make full lanes, to be replaced by :meth:`put`."""
        nothing = np.zeros(shape, dtype=np.int64)
        return cls.make(nothing, nothing.copy(), np.ones((*shape, stride), dtype=bool))

    @property
    def stride(self) -> int:
        return int(self.passing.shape[-1])

    def put(self, row: int, other: Lanes) -> None:
        """Replace lanes ``[:, row]`` by ``other``."""
        for name in _ARRAYS:
            getattr(self, name)[:, row] = getattr(other, name)

    def first_rows(self, count: int) -> Lanes:
        """View lanes ``[:, :count]``."""
        return self._each(lambda lanes: lanes[:, :count])

    def by_head(self, rows: IntArray) -> Lanes:
        """Pick lanes ``[:, rows]``, the row last: ``[layers, heads, len(rows)]``."""
        return self._each(lambda lanes: lanes[:, rows].swapaxes(1, 2))

    def _each(self, pick: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Lanes:
        arrays: dict[str, Any] = {n: pick(getattr(self, n)) for n in _ARRAYS}
        return replace(self, **arrays)

    def passing_before(self, block: IntArray) -> IntArray:
        """Count the passing blocks before ``block``."""
        beyond = np.maximum(block - self.sinks[..., None], 0)
        if self.stride == 1:
            return np.asarray(beyond * self.turn[..., None])
        turns, place = np.divmod(beyond, self.stride)
        rest = np.take_along_axis(self.before, place, axis=-1)
        count: IntArray = turns * self.turn[..., None] + rest
        return count

    def opens(self, block: IntArray) -> BoolArray:
        """Tell whether ``block`` gets a slot of its own instead of an older block's."""
        opens = self._stays(block) | (self.passing_before(block) < self.ring[..., None])
        return opens & self.present[..., None]

    def slot_of(self, block: IntArray) -> IntArray:
        """Slot of ``block``: itself, or the block that opened the slot."""
        number = self.passing_before(block) % np.maximum(self.ring, 1)[..., None]
        opener = self._nth(self.passing, self.turn, number)
        return np.where(self._stays(block), block, opener)

    def passed(self, block: IntArray) -> IntArray:
        """Count the blocks that a query in ``block`` no longer sees, as they were."""
        return self.passing_before(self._window_start(block))

    def hidden(self, block: IntArray) -> IntArray:
        """The same, less the pages into which some of their tokens are packed."""
        passed = self.passed(block)
        return passed - self.history(block) if self.page_size else passed

    def history(self, block: IntArray) -> IntArray:
        """Count the history pages that a query in ``block`` sees."""
        pages: IntArray = -(-self._kept(block) // max(self.page_size, 1))
        return pages

    def gap(self, block: IntArray) -> IntArray:
        """First hidden key, and the first behind, in a row of a query in ``block``.

        Returns:
            ``[*S, n, 2]``, in tokens.
        """
        first, pages = self.sinks[..., None] * self.page_size, self.history(block)
        ends = first + self._kept(block), first + pages * self.page_size
        return np.stack(np.broadcast_arrays(*ends), axis=-1)

    def _kept(self, block: IntArray) -> IntArray:
        """Count the tokens that are left of groups in front of a query's window."""
        if not self.page_size:
            return np.zeros_like(self.group)[..., None]
        groups = self.groups(block)
        kept: IntArray = groups * self.keep[..., None]
        return kept

    def groups(self, block: IntArray) -> IntArray:
        """Count the groups that lie wholly in front of a query's window."""
        sinks, window = self.sinks[..., None], self.window[..., None]
        beyond = np.maximum(block + 1 - window - sinks, 0)
        group = self.group[..., None]
        groups: IntArray = np.where(group > 0, beyond // np.maximum(group, 1), 0)
        return groups

    def visible(self, block: IntArray, width: int, history: int = 0) -> IntArray:
        """List the blocks that a query in ``block`` sees, ascending, its own last.

        Args:
            history: what the first history page counts as, behind all blocks.

        Returns:
            ``[*S, n, width]``, cut to or padded with -1 to ``width``.
        """
        place = np.arange(width)
        start = self._window_start(block)
        older = (start - self.passing_before(start))[..., None]
        sinks = self.sinks[..., None]
        stays = self._nth(self.staying, self.stride - self.turn, place - sinks)
        stayed = np.where(place < sinks, place, stays)[..., None, :]
        packed = self.history(block)[..., None]
        raw = start[..., None] + place - older - packed
        raw = np.where(raw <= block[..., None], raw, -1)
        thinned = np.where(place < older + packed, history + place - older, raw)
        first = np.where(stayed <= block[..., None], stayed, -1)
        return np.where(place < older, first, thinned)

    def sees(self, block: IntArray, query: int) -> BoolArray:
        """Tell whether a query in block ``query`` or a later one sees ``block``.

        Blocks behind the query's own, which later queries see, count as seen.
        """
        start = self._window_start(np.array([query]))
        return self._stays(block) | (block >= start)

    def _window_start(self, block: IntArray) -> IntArray:
        window = self.window[..., None]
        start: IntArray = np.maximum(block + 1 - window, 0)
        if self.aligned.any():
            aligned = block - block % np.maximum(window, 1)
            start = np.where(self.aligned[..., None], aligned, start)
        if self.page_size:
            group, sinks = self.group[..., None], self.sinks[..., None]
            thinned = sinks + self.groups(block) * group
            start = np.where(group > 0, thinned, start)
        return start

    def _stays(self, block: IntArray) -> BoolArray:
        beyond = block - self.sinks[..., None]
        if self.stride == 1:
            return np.asarray((beyond < 0) | (self.turn == 0)[..., None])
        place = beyond % self.stride
        count = np.take_along_axis(self.before, place, axis=-1)
        following = np.take_along_axis(self.before, place + 1, axis=-1)
        return np.asarray((beyond < 0) | (following == count))

    def _nth(self, places: IntArray, turn: IntArray, number: IntArray) -> IntArray:
        """Block of the ``number``-th of its kind behind the sinks."""
        if self.stride == 1:
            return self.sinks[..., None] + number
        turns, rest = np.divmod(number, np.maximum(turn, 1)[..., None])
        place = np.take_along_axis(places, rest, axis=-1)
        block: IntArray = self.sinks[..., None] + turns * self.stride + place
        return block


_ARRAYS = tuple(one.name for one in fields(Lanes) if one.name != "page_size")


def _most_in_window(before: IntArray, window: IntArray) -> IntArray:
    """Most passing blocks among any ``window`` blocks in a row."""
    stride, turn = before.shape[-1] - 1, before[..., -1]
    turns, rest = np.divmod(window, stride)
    most = np.zeros_like(window)
    for first in range(stride):
        wraps, last = np.divmod(first + rest, stride)
        until = np.take_along_axis(before, last[..., None], axis=-1)[..., 0]
        most = np.maximum(most, until + wraps * turn - before[..., first])
    count: IntArray = turns * turn + most
    return count
