"""Which of many boxes overlap.

A box is ``start <= index < stop`` in every dim of a tensor. Boxes of tensors of different dimensionality stand in one
array, filled up with dims of size one, and ``group`` says which tensor each belongs to, so that one pass of numpy
serves a whole manifest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distrain.core.boxes import Point

Ints: TypeAlias = NDArray[np.int64]

_PAIRS_AT_ONCE = 1 << 20  # bounds memory; small enough for the caches


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """N boxes of up to D dims; a box without elements overlaps nothing."""

    group: Ints
    """[N]"""
    start: Ints
    """[N, D]"""
    stop: Ints
    """[N, D]"""

    @property
    def sizes(self) -> Ints:
        """[N] elements of each box."""
        sizes: Ints = np.prod(self.stop - self.start, axis=1, dtype=np.int64)
        return sizes

    @property
    def strides(self) -> Ints:
        """[N, D] elements from one element to the next in each dim, in row-major order."""
        behind = np.cumprod((self.stop - self.start)[:, ::-1], axis=1)[:, ::-1]
        return np.concatenate((behind[:, 1:], np.ones_like(behind[:, :1])), axis=1)


def boxes(rows: Iterable[tuple[int, Point, Point]], num_dims: int) -> Boxes:
    """Boxes from rows of group, offset and shape, each of at most ``num_dims`` dims."""
    fill = [(0,) * (num_dims - dims) for dims in range(num_dims + 1)]
    ones = [(1,) * (num_dims - dims) for dims in range(num_dims + 1)]
    flat = [(group, *offset, *fill[len(offset)], *shape, *ones[len(shape)]) for group, offset, shape in rows]
    table = np.array(flat, np.int64).reshape(len(flat), 1 + 2 * num_dims)
    start, shape = table[:, 1 : 1 + num_dims], table[:, 1 + num_dims :]
    return Boxes(table[:, 0], start, start + shape)


def meeting(first: Boxes, second: Boxes) -> tuple[Ints, Ints]:
    """Indices [P], [P] of all pairs of a box of ``first`` and one of ``second`` that share an element.

    Ordered by the first, then by the second's place in its group.
    """
    order = np.argsort(second.group, kind="stable")
    groups = second.group[order]
    begin = np.searchsorted(groups, first.group, "left")
    count = np.searchsorted(groups, first.group, "right") - begin
    end = np.cumsum(count)
    found: list[tuple[Ints, Ints]] = []
    row = 0
    while row < len(count):
        done = end[row] - count[row]
        until = max(row + 1, int(np.searchsorted(end, done + _PAIRS_AT_ONCE, "right")))
        mine = np.repeat(np.arange(row, until), count[row:until])
        theirs = np.arange(len(mine)) - np.repeat(end[row:until] - count[row:until] - done, count[row:until])
        theirs = order[theirs + np.repeat(begin[row:until], count[row:until])]
        found.append(_that_meet(first, second, mine, theirs))
        row = until
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    mine, theirs = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return mine, theirs


def _that_meet(first: Boxes, second: Boxes, mine: Ints, theirs: Ints) -> tuple[Ints, Ints]:
    """The pairs that share an element. Each dim drops some, so that the next has less to do."""
    for dim in range(first.start.shape[1]):
        low = np.maximum(first.start[mine, dim], second.start[theirs, dim])
        high = np.minimum(first.stop[mine, dim], second.stop[theirs, dim])
        meet = low < high
        mine, theirs = mine[meet], theirs[meet]
    return mine, theirs
