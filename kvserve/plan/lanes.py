# SPDX-License-Identifier: Apache-2.0
"""Which blocks a lane keeps, and in which slot each of them lives, in closed form.

A lane has ``s`` sink blocks and sees its last ``w`` blocks; a full lane keeps them all.
Behind the sinks, blocks are counted in *turns* of ``stride``, and those in the lane's
shards stay for good like sinks. All other blocks are *passing*: they leave when the
window does. The lane holds its last ``ring`` passing blocks, as many as a window can
hold, and a passing block lives where the one ``ring`` passing blocks before it lived.

The window of an *aligned* lane does not slide: a query sees from the last multiple of
``w`` blocks on.

A slot is named after the block that opened it. In lanes that do not recycle slots every
block opens its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
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
        )

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
        for one in fields(self):
            getattr(self, one.name)[:, row] = getattr(other, one.name)

    def first_rows(self, count: int) -> Lanes:
        """View lanes ``[:, :count]``."""
        return Lanes(*(getattr(self, one.name)[:, :count] for one in fields(self)))

    def by_head(self, rows: IntArray) -> Lanes:
        """Pick lanes ``[:, rows]``, the row last: ``[layers, heads, len(rows)]``."""
        return Lanes(
            *(getattr(self, one.name)[:, rows].swapaxes(1, 2) for one in fields(self))
        )

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

    def hidden(self, block: IntArray) -> IntArray:
        """Count the blocks that a query in ``block`` no longer sees."""
        return self.passing_before(self._window_start(block))

    def visible(self, block: IntArray, width: int) -> IntArray:
        """List the blocks that a query in ``block`` sees, ascending, its own last.

        Returns:
            ``[*S, n, width]``, cut to or padded with -1 to ``width``.
        """
        place = np.arange(width)
        start = self._window_start(block)
        older = (start - self.passing_before(start))[..., None]
        sinks = self.sinks[..., None]
        stays = self._nth(self.staying, self.stride - self.turn, place - sinks)
        stayed = np.where(place < sinks, place, stays)[..., None, :]
        listed = np.where(place < older, stayed, start[..., None] + place - older)
        return np.where(listed <= block[..., None], listed, -1)

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
