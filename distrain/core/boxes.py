"""Runs of a flattened tensor as boxes of the tensor itself.

ZeRO's flat buckets cut parameters wherever a slice ends, in the middle of a row if need be. A checkpoint that any other
layout can read knows boxes only. A run of elements in C order is a few boxes: a part of a row, whole rows, a part of a
row, and so on outwards (ByteCheckpoint, 2407.20143, calls them irregular tensors)::

    4 x 6, elements 3 to 20:    . . . a a a      a: box at (0, 3), 1 x 3
                                b b b b b b      b: box at (1, 0), 2 x 6
                                b b b b b b
                                c c . . . .      c: box at (3, 0), 1 x 2
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from .protocols import ShardBox


def runs_to_boxes(box: ShardBox, *, first: int, count: int) -> Iterator[tuple[ShardBox, int]]:
    """Cut elements ``first`` to ``first + count`` of the flattened ``box`` into boxes, in C order.

    Yields each box with the number of elements of the run before it. At most two boxes a dim and one more.
    """
    if not 0 <= first <= first + count <= prod(box.shape):
        raise ValueError(f"elements {first} to {first + count} of {prod(box.shape)}")
    done = 0
    for offset, shape in _cut(box.shape, first, count):
        start = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
        yield replace(box, offset=start, shape=shape), done
        done += prod(shape)


def _cut(shape: tuple[int, ...], first: int, count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and shape of each box, within ``shape``."""
    if count == 0:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    if first == 0 and count == prod(shape):
        yield (0,) * len(shape), shape
        return
    begin, end = divmod(first, row), divmod(first + count, row)
    if begin[0] == end[0]:
        yield from _within(shape, begin[0], begin[1], count)
        return
    if begin[1]:
        yield from _within(shape, begin[0], begin[1], row - begin[1])
    top = begin[0] + (begin[1] > 0)
    if end[0] > top:
        yield (top, *(0,) * (len(shape) - 1)), (end[0] - top, *shape[1:])
    if end[1]:
        yield from _within(shape, end[0], 0, end[1])


def _within(
    shape: tuple[int, ...], index: int, first: int, count: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The part of one row."""
    for offset, inner in _cut(shape[1:], first, count):
        yield (index, *offset), (1, *inner)
