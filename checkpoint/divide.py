"""Who writes what: replicas share the writing instead of writing the same bytes several times.

Data-parallel replicas hold equal boxes. Each writes its part of them, so that n replicas copy and write 1/n of what one
would have to (REFT, 2310.12670, calls it sharded parallel snapshotting).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Protocol, TypeVar

from distrain.core.errors import ConfigError, Problem
from distrain.core.protocols import ShardBox

from .layout import box_bytes

SPLIT_FROM = 1 << 20
"""bytes of a box from which on replicas cut it; smaller ones are dealt out whole"""


def divide(boxes_by_rank: Sequence[Sequence[ShardBox]]) -> tuple[tuple[ShardBox, ...], ...]:
    """Which boxes, or parts of them, each rank writes, so that every element is written once and loads are even.

    Boxes that several ranks hold alike are cut along dim 0, or dealt out whole where they are small; a rank only ever
    gets parts of what it holds, in its own order. Every rank computes the same from the same input.

    Raises:
        ConfigError: ranks disagree about a tensor, or hold boxes that overlap without being equal; lists all.
    """
    holders: dict[ShardBox, dict[int, int]] = defaultdict(dict)  # box -> rank -> place in the rank's order
    for rank, held in enumerate(boxes_by_rank):
        for place, box in enumerate(held):
            if prod(box.shape) or not prod(box.global_shape):
                holders[box].setdefault(rank, place)
    _refuse_disagreement(holders)
    dealt: list[list[tuple[int, ShardBox]]] = [[] for _ in boxes_by_rank]
    loads = [0] * len(boxes_by_rank)
    parts = [(part, ranks) for box, ranks in holders.items() for part in _parts(box, len(ranks))]
    # Those without a choice first, then the largest: what comes last evens the loads out.
    parts.sort(key=lambda entry: (len(entry[1]) > 1, -box_bytes(entry[0])))
    for part, ranks in parts:
        rank = min(ranks, key=lambda r: (loads[r], r))
        loads[rank] += box_bytes(part)
        dealt[rank].append((ranks[rank], part))
    return tuple(tuple(box for _, box in sorted(mine, key=_by_place)) for mine in dealt)


def owners(held: Sequence[ShardBox], parts: Sequence[ShardBox]) -> list[int]:
    """In which of the boxes of a rank each part lies that it was dealt."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, box in enumerate(held):
        places[box.fqn].append(index)
    return [next(index for index in places[part.fqn] if _contains(held[index], part)) for part in parts]


def _contains(box: ShardBox, part: ShardBox) -> bool:
    dims = zip(part.offset, part.shape, box.offset, box.shape, strict=True)
    return all(a >= b and a + n <= b + m for a, n, b, m in dims)


def _by_place(entry: tuple[int, ShardBox]) -> tuple[int, tuple[int, ...]]:
    return entry[0], entry[1].offset


def _parts(box: ShardBox, num_ranks: int) -> Iterator[ShardBox]:
    """``box`` in up to ``num_ranks`` parts along dim 0, equal within one row."""
    count = min(num_ranks, box.shape[0]) if box.shape and box_bytes(box) >= SPLIT_FROM else 1
    if count <= 1:
        yield box
        return
    for i in range(count):
        first, end = box.shape[0] * i // count, box.shape[0] * (i + 1) // count
        offset = (box.offset[0] + first, *box.offset[1:])
        yield replace(box, offset=offset, shape=(end - first, *box.shape[1:]))


def _refuse_disagreement(holders: dict[ShardBox, dict[int, int]]) -> None:
    by_name: dict[str, list[ShardBox]] = defaultdict(list)
    for box in holders:
        by_name[box.fqn].append(box)
    problems = []
    for name, boxes in by_name.items():
        first = boxes[0]
        for box in boxes:
            if (box.dtype, box.global_shape) != (first.dtype, first.global_shape):
                kinds = " and ".join(f"{b.dtype}{list(b.global_shape)}" for b in (first, box))
                ranks = f"rank {min(holders[first])} and rank {min(holders[box])}"
                problems.append(Problem(f"ranks disagree about {name}", got=f"{kinds} on {ranks}"))
                break
        else:
            if pair := overlapping(boxes):
                a, b = pair
                problems.append(
                    Problem(
                        f"ranks hold parts of {name} that overlap",
                        got=f"offset {a.offset}, shape {a.shape} on rank {min(holders[a])};"
                        f" offset {b.offset}, shape {b.shape} on rank {min(holders[b])}",
                        allowed="equal boxes (replicas) or disjoint ones (shards)",
                    )
                )
    if problems:
        raise ConfigError.of(problems)


class Region(Protocol):
    """Anything with an offset and a shape within one tensor."""

    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


R = TypeVar("R", bound=Region)


def overlapping(boxes: Sequence[R]) -> tuple[R, R] | None:
    """Two boxes of one tensor that share an element, if there are any.

    Sweeps along the dim in which the boxes differ most, so that few are open at a time.
    """
    solid = [box for box in boxes if prod(box.shape)]
    if len(solid) < 2:
        return None
    dims = len(solid[0].shape)
    if not dims:
        return solid[0], solid[1]
    sweep = max(range(dims), key=lambda dim: len({box.offset[dim] for box in solid}))
    open_: list[R] = []
    for box in sorted(solid, key=lambda box: box.offset[sweep]):
        start = box.offset[sweep]
        open_ = [other for other in open_ if other.offset[sweep] + other.shape[sweep] > start]
        for other in open_:
            if _meet(box, other):
                return other, box
        open_.append(box)
    return None


def _meet(a: Region, b: Region) -> bool:
    dims = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(p < q + m and q < p + n for p, n, q, m in dims)
