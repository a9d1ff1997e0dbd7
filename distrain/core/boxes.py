"""Runs of a flattened tensor as boxes of the tensor itself.

ZeRO's flat buckets cut parameters wherever a slice ends, in the middle of a row if need be. A checkpoint that any other
layout can read knows boxes only. A run of elements in C order is a few boxes: a part of a row, whole rows, a part of a
row, and so on outwards (ByteCheckpoint, 2407.20143, calls them irregular tensors)::

    4 x 6, elements 3 to 20:    . . . a a a      a: box at (0, 3), 1 x 3
                                b b b b b b      b: box at (1, 0), 2 x 6
                                b b b b b b
                                c c . . . .      c: box at (3, 0), 1 x 2
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

from .protocols import ShardBox

Point: TypeAlias = tuple[int, ...]


def runs_to_boxes(box: ShardBox, *, first: int, count: int) -> Iterator[tuple[ShardBox, int]]:
    """Cut elements ``first`` to ``first + count`` of the flattened ``box`` into boxes, in C order.

    Yields each box with the number of elements of the run before it. At most two boxes a dim and one more.
    """
    if not 0 <= first <= first + count <= prod(box.shape):
        raise ValueError(f"elements {first} to {first + count} of {prod(box.shape)}")
    done = 0
    for offset, shape in runs(box.shape, first, first + count):
        start = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
        yield replace(box, offset=start, shape=shape), done
        done += prod(shape)


def runs(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Point, Point]]:
    """Elements ``start`` to ``stop`` of a row-major array of ``shape`` as boxes: offset and shape of each."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = tuple(shape[1:])
    row = prod(inner)
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _within(first, runs(inner, head, tail))
        return
    if head:
        yield from _within(first, runs(inner, head, row))
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    if tail:
        yield from _within(last, runs(inner, 0, tail))


def _within(index: int, parts: Iterable[tuple[Point, Point]]) -> Iterator[tuple[Point, Point]]:
    """Parts of one row as parts of the whole."""
    return (((index, *offset), (1, *shape)) for offset, shape in parts)
