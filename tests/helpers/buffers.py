"""Small problems of buffers, and their true answers by trying everything."""

import random
from collections.abc import Iterable, Sequence
from itertools import permutations

from hypothesis import strategies as st

from distrain.planners.buffers import Buffer


def buffers(*rows: tuple[int, int, int]) -> tuple[Buffer, ...]:
    """Buffers from rows of lower, upper, size."""
    return tuple(Buffer(f"b{index}", *row) for index, row in enumerate(rows))


def any_buffers(
    *, most: int, most_time: int = 8, most_size: int = 6
) -> st.SearchStrategy[tuple[Buffer, ...]]:
    """Problems of 1 to ``most`` buffers."""
    row = st.tuples(st.integers(0, most_time - 1), st.integers(1, most_time), st.integers(1, most_size)).map(
        lambda row: (row[0], row[0] + row[1], row[2])
    )
    return st.lists(row, min_size=1, max_size=most).map(lambda rows: buffers(*rows))


def lowest_peak(given: Sequence[Buffer]) -> int:
    """The best peak there is: of all orders in which each buffer is put on top of those it meets."""
    return min(_peak(order) for order in permutations(given))


def _peak(order: Iterable[Buffer]) -> int:
    placed: list[tuple[Buffer, int]] = []
    for buffer in order:
        top = max((end for other, end in placed if other.meets(buffer)), default=0)
        placed.append((buffer, top + buffer.size))
    return max(end for _, end in placed)


SIDE = 4096


def perfect(num: int, seed: int, *, dropped: float = 0.0) -> tuple[Buffer, ...]:
    """A square of ``SIDE`` cut into ``num`` pieces, shuffled: fits without a gap, or with the gaps of those dropped.

    Pieces of the middle are never dropped, so that as much lives there as there is room for.
    """
    drawn = random.Random(seed)
    pieces = [(0, SIDE, 0, SIDE)]
    while len(pieces) < num / (1 - dropped):
        a, b, c, d = pieces.pop(drawn.randrange(len(pieces)))
        if drawn.random() < (b - a) / (b - a + d - c) and b - a > 1:
            middle = drawn.randint(a + 1, b - 1)
            pieces += [(a, middle, c, d), (middle, b, c, d)]
        elif d - c > 1:
            middle = drawn.randint(c + 1, d - 1)
            pieces += [(a, b, c, middle), (a, b, middle, d)]
        else:
            pieces.append((a, b, c, d))
    drawn.shuffle(pieces)
    pieces.sort(key=lambda piece: not piece[0] <= SIDE // 2 < piece[1])
    pieces = pieces[:num]
    drawn.shuffle(pieces)
    return buffers(*((a, b, d - c) for a, b, c, d in pieces))


PINWHEEL = buffers((0, 3, 2), (3, 5, 3), (2, 5, 2), (0, 2, 3), (2, 3, 1))
"""fills a 5 by 5 square; no cut goes through it"""

TOO_TALL = buffers((3, 5, 1), (1, 2, 3), (4, 6, 3), (2, 4, 1), (1, 3, 3), (2, 5, 2), (5, 6, 3))
"""at no moment more than 6 bytes live, and yet nothing fits under 7"""
