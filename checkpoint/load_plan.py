"""Which bytes of a checkpoint fill which parts of the tensors that a process holds now.

A checkpoint and a running job cut the same tensors into boxes of their own, because tensor, pipeline and data
parallel degrees may have changed in between. Where a stored box and a wanted one overlap, data has to flow. A stored
box is a run of bytes in row-major order that may span extents, and an extent is the unit that is read and verified.
So a plan lists the extents that are needed, each once, and under each the blocks to scatter from it::

    stored box, wanted part #                its bytes
        . . . . . . . .                      ├── extent 4 ──┤├───── extent 5 ─────┤├── extent 6 ──┤
        . . # # # # . .                      . . . . . . . . . . # # # # . . . . # # # # . . . . #
        . . # # # # . .
        . . # # # # . .                      the boundary between 5 and 6 divides the third row of #

Everything up to the blocks is arithmetic on arrays: a manifest of a 65B model has some 100,000 boxes.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distrain.core.boxes import Point, runs
from distrain.core.errors import Problem, nearest, raise_if
from distrain.core.protocols import ShardBox

from .intersect import Boxes, Ints, boxes, meeting
from .layout import DTYPES, EXTENT_BYTES

_LISTED = 50
_COMPARED = 5  # comparing names is slow, and a mistake repeats


class StoredBox(Protocol):
    """One box of a tensor in a manifest or an arena: row-major bytes from ``byte_offset`` of a writer's bytes."""

    @property
    def offset(self) -> Point: ...
    @property
    def shape(self) -> Point: ...
    @property
    def writer(self) -> int: ...
    @property
    def byte_offset(self) -> int: ...


class StoredTensor(Protocol):
    """All boxes of one tensor; they do not overlap."""

    @property
    def dtype(self) -> str: ...
    @property
    def global_shape(self) -> Point: ...
    @property
    def boxes(self) -> Sequence[StoredBox]: ...


@dataclass(frozen=True, slots=True)
class Block:
    """A block of elements of one extent, and where it goes."""

    target: int
    """index in the targets of the plan"""
    offset: Point
    """in the target's own box"""
    shape: Point
    start: int
    """bytes from the beginning of the extent to the first element"""
    strides: Point
    """bytes from one element to the next in each dim"""


@dataclass(frozen=True, slots=True)
class Read:
    """One extent to read and verify, and what to scatter from it."""

    writer: int
    extent: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What fills the targets: reads ordered by writer and extent, no extent twice."""

    targets: tuple[ShardBox, ...]
    reads: tuple[Read, ...]
    missing: tuple[str, ...]
    """names of targets that the checkpoint does not have"""
    extra: tuple[str, ...]
    """names in the checkpoint for which there is no target"""


def plan(
    targets: Sequence[ShardBox],
    sources: Mapping[str, StoredTensor],
    *,
    allow_missing: bool = False,
    allow_extra: bool = True,
) -> LoadPlan:
    """How to fill ``targets`` from ``sources`` (by name).

    Raises:
        ConfigError: a target differs from what is stored in dtype or global shape, or is not stored exactly once; a
            name is not stored at all (unless ``allow_missing``), or is stored and not asked for (unless
            ``allow_extra``). Lists all.
    """
    wanted = dict.fromkeys(target.fqn for target in targets)
    missing = tuple(name for name in wanted if name not in sources)
    extra = tuple(name for name in sources if name not in wanted)
    problems = [] if allow_missing else _unpaired(missing, sources, "is not in the checkpoint")
    problems += (
        [] if allow_extra else _unpaired(extra, wanted, "is in the checkpoint, and nothing asks for it")
    )
    misfits = {t.fqn: _misfits(t, sources[t.fqn]) for t in targets if t.fqn in sources}
    problems += [problem for found in misfits.values() for problem in found]
    overlaps = _Overlaps.of(targets, {name: sources[name] for name, found in misfits.items() if not found})
    problems += overlaps.gaps()
    if left := problems[_LISTED:]:
        problems[_LISTED:] = [Problem(f"and {len(left)} more problems")]
    raise_if(problems)
    return LoadPlan(tuple(targets), overlaps.reads(), missing, extra)


def _unpaired(names: Sequence[str], others: Collection[str], error: str) -> list[Problem]:
    hints = [
        close and f"the other side has {close}" for close in (nearest(n, others) for n in names[:_COMPARED])
    ]
    hints += [""] * (len(names) - len(hints))
    return [
        Problem(f"{name} {error}", hint=hint or "load partially to pass it over")
        for name, hint in zip(names, hints, strict=True)
    ]


def _misfits(target: ShardBox, source: StoredTensor) -> list[Problem]:
    pairs = (
        ("dtype", target.dtype, source.dtype),
        ("global shape", target.global_shape, tuple(source.global_shape)),
    )
    return [
        Problem(f"{target.fqn} has another {what} in the checkpoint", got=f"{have} here, {stored} there")
        for what, have, stored in pairs
        if have != stored
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Overlaps:
    """Every overlap of a target with a stored box: row i of the last five arrays is one of P."""

    targets: Sequence[ShardBox]
    wanted: Boxes
    """[T] the targets; of group -1 if nothing is to be loaded into one"""
    stored: Sequence[StoredBox]
    strides: Ints
    """[S, D] bytes from one element of a stored box to the next"""
    target: Ints
    source: Ints
    offset: Ints
    """[P, D] in the target's box"""
    inner: Ints
    """[P, D] in the stored box"""
    shape: Ints
    """[P, D]"""

    @staticmethod
    def of(targets: Sequence[ShardBox], sources: Mapping[str, StoredTensor]) -> "_Overlaps":
        group = {name: i for i, name in enumerate(sources)}
        num_dims = max((len(source.global_shape) for source in sources.values()), default=0)
        stored = [box for source in sources.values() for box in source.boxes]
        owner = [
            (group[name], DTYPES[source.dtype]) for name, source in sources.items() for _ in source.boxes
        ]
        held = boxes(
            ((g, box.offset, box.shape) for (g, _), box in zip(owner, stored, strict=True)), num_dims
        )
        wanted = boxes(
            ((group[t.fqn], t.offset, t.shape) if t.fqn in group else (-1, (), ()) for t in targets), num_dims
        )
        target, source = meeting(wanted, held)
        low = np.maximum(wanted.start[target], held.start[source])
        high = np.minimum(wanted.stop[target], held.stop[source])
        return _Overlaps(
            targets=targets,
            wanted=wanted,
            stored=stored,
            strides=held.strides * np.array([itemsize for _, itemsize in owner], np.int64)[:, None],
            target=target,
            source=source,
            offset=low - wanted.start[target],
            inner=low - held.start[source],
            shape=high - low,
        )

    def gaps(self) -> list[Problem]:
        """Targets that would not be filled exactly once."""
        sizes = self.wanted.sizes
        filled = np.zeros_like(sizes)
        np.add.at(filled, self.target, self.shape.prod(axis=1))
        wrong = np.flatnonzero((filled != sizes) & (self.wanted.group >= 0)).tolist()
        return [
            Problem(
                f"{self.targets[i].fqn} is not stored whole",
                got=f"{filled[i]} of the {sizes[i]} elements of a box at {self.targets[i].offset}"
                f" of shape {self.targets[i].shape}",
            )
            for i in wrong
        ]

    def reads(self) -> tuple[Read, ...]:
        """The overlaps as blocks, by extent."""
        found: dict[tuple[int, int], list[Block]] = defaultdict(list)
        for writer, extent, block in self._blocks():
            found[writer, extent].append(block)
        return tuple(Read(*place, tuple(blocks)) for place, blocks in sorted(found.items()))

    def _blocks(self) -> Iterator[tuple[int, int, Block]]:
        strides = self.strides[self.source]
        first = np.array([box.byte_offset for box in self.stored], np.int64)[self.source]
        first = first + (self.inner * strides).sum(axis=1)
        last = first + ((self.shape - 1) * strides).sum(axis=1)
        columns = (
            self.target,
            self.source,
            first,
            last // EXTENT_BYTES,
            self.offset,
            self.inner,
            self.shape,
            strides,
        )
        for target, source, start, last_extent, *places in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            box, dims = self.stored[source], len(self.targets[target].shape)
            offset, inner, shape, stride = (tuple(place[:dims]) for place in places)
            extent = start // EXTENT_BYTES
            if extent == last_extent:
                yield box.writer, extent, Block(target, offset, shape, start - extent * EXTENT_BYTES, stride)
                continue
            for each in range(extent, last_extent + 1):
                for low, size in _within(each, box, stride[-1], inner, shape):
                    beyond = tuple(a - b for a, b in zip(low, inner, strict=True))
                    place = tuple(a + b for a, b in zip(offset, beyond, strict=True))
                    at = start + sum(a * b for a, b in zip(beyond, stride, strict=True)) - each * EXTENT_BYTES
                    yield box.writer, each, Block(target, place, size, at, stride)


def _within(
    extent: int, box: StoredBox, itemsize: int, offset: Point, shape: Point
) -> Iterator[tuple[Point, Point]]:
    """What of the part ``offset``, ``shape`` of a stored box lies in one extent: parts of the box."""
    begin = max(0, extent * EXTENT_BYTES - box.byte_offset) // itemsize
    end = min(math.prod(box.shape), ((extent + 1) * EXTENT_BYTES - box.byte_offset) // itemsize)
    stop = tuple(a + n for a, n in zip(offset, shape, strict=True))
    for start, size in runs(box.shape, begin, end):
        low = tuple(map(max, start, offset))
        high = tuple(min(a + n, b) for a, n, b in zip(start, size, stop, strict=True))
        if all(a < b for a, b in zip(low, high, strict=True)):
            yield low, tuple(b - a for a, b in zip(low, high, strict=True))
