"""Reads the extents of a load plan, each once and verified, and scatters them to where they belong.

A few threads each take the next extent, read it into a buffer of their own and copy its blocks straight to the
targets. So reading, checking and copying of different extents overlap, memory is bounded by the buffers, and no
tensor ever exists a second time. Where extents lie does not matter: a file on a disk and a slot of the arena serve
alike.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distrain.core.errors import Problem, raise_if
from distrain.core.protocols import ShardBox

from .blob import BlobReader
from .layout import DTYPES, STRIDE
from .load_plan import LoadPlan, Read, plan
from .storage import Storage, aligned_memory
from .stored import Manifest

__all__ = ["Extents", "LoadPlan", "Writers", "blobs", "execute", "memory_of", "plan", "scatter"]

NUM_THREADS = 4

_UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
Memory: TypeAlias = "memoryview | NDArray[Any]"


class Extents(Protocol):
    """The bytes of one writer."""

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        """The EXTENT_BYTES of an extent, verified: in ``buffer``, STRIDE page-aligned bytes, or where they lie.

        Raises:
            DataError: they are not what was written.
        """


Open: TypeAlias = Callable[[int], AbstractContextManager[Extents]]


def blobs(storage: Storage, folder: str, manifest: Manifest) -> Open:
    """Opens the writers of the checkpoint in ``folder``."""
    return lambda writer: BlobReader(storage, folder, writer=writer, crcs=manifest.writers[writer].crcs)


def execute(
    load_plan: LoadPlan, open_writer: Open, out: Sequence[Memory], *, num_threads: int = NUM_THREADS
) -> None:
    """Fill ``out``, the memory of each target of the plan.

    An array has its target's shape and an element of the same size, of whatever type, and may be strided; a
    memoryview is contiguous bytes. ``open_writer`` is called once for each writer, from any thread. If this raises,
    some of the targets are filled and others are not.

    Raises:
        ConfigError: memory does not fit its target (lists all).
        DataError: an extent is damaged.
    """
    views = memory_of(load_plan.targets, out)
    work = _Work(load_plan.reads, open_writer)
    threads = [
        threading.Thread(target=work.run, args=(views,), name=f"load-{i}", daemon=True)
        for i in range(min(num_threads, len(load_plan.reads)))
    ]
    with work:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if work.error:
        raise work.error


class Writers:
    """Writers opened when they are needed, from any thread, and closed at the end of the block at the latest."""

    def __init__(self, open_writer: Open) -> None:
        self._open_writer = open_writer
        self._lock = threading.Lock()
        self._open: dict[int, tuple[AbstractContextManager[Extents], Extents]] = {}

    def open(self, number: int) -> Extents:
        """The extents of a writer."""
        with self._lock:
            if number not in self._open:
                opened = self._open_writer(number)
                self._open[number] = opened, opened.__enter__()
            return self._open[number][1]

    def keep(self, numbers: Collection[int]) -> None:
        """Close all others: of thousands, only a few are open at a time."""
        with self._lock:
            for number in self._open.keys() - set(numbers):
                self._close(number)

    def close(self, number: int) -> None:
        """Close one."""
        with self._lock:
            self._close(number)

    def _close(self, number: int) -> None:
        self._open.pop(number)[0].__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.keep(())


class _Work:
    """The reads that are left, shared by threads."""

    def __init__(self, reads: Sequence[Read], open_writer: Open) -> None:
        self.error: BaseException | None = None
        self._reads = iter(reads)
        self._writers = Writers(open_writer)
        self._lock = threading.Lock()
        self._left = Counter(read.writer for read in reads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reads = iter(())  # an interrupt leaves threads behind, which end after their present read
        self._writers.keep(())

    def run(self, views: Sequence[NDArray[Any]]) -> None:
        """Take one read after another until there is none, or one has failed."""
        buffer = aligned_memory(STRIDE)
        try:
            while read := self._next():
                scatter(read, self._writers.open(read.writer).read(read.extent, buffer), views)
                self._done(read.writer)
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
                self._reads = iter(())

    def _next(self) -> Read | None:
        with self._lock:
            return next(self._reads, None)

    def _done(self, number: int) -> None:
        """Close a writer after its last read."""
        with self._lock:
            self._left[number] -= 1
            if not self._left[number]:
                self._writers.close(number)


def scatter(read: Read, data: memoryview, views: Sequence[NDArray[Any]]) -> None:
    """Copy the blocks of a read from the data of its extent to the memory of the targets."""
    for block in read.blocks:
        target = views[block.target]
        source = np.ndarray(block.shape, target.dtype, data, block.start, block.strides)
        target[tuple(slice(a, a + n) for a, n in zip(block.offset, block.shape, strict=True))] = source


def memory_of(targets: Sequence[ShardBox], out: Sequence[Memory]) -> list[NDArray[Any]]:
    """The memory of each target as an array of the target's shape.

    Raises:
        ConfigError: some does not fit its target (lists all).
    """
    views = [_view(target, memory) for target, memory in zip(targets, out, strict=True)]
    raise_if(
        [
            Problem(
                f"the memory given for {target.fqn} does not fit",
                got=f"shape {array.shape} of {array.itemsize} bytes an element, writable: {array.flags.writeable}",
                allowed=f"{target.dtype} of shape {target.shape}, writable",
            )
            for target, array in zip(targets, views, strict=True)
            if (array.shape, array.itemsize) != (target.shape, DTYPES[target.dtype])
            or not array.flags.writeable
        ]
    )
    return views


def _view(target: ShardBox, memory: Memory) -> NDArray[Any]:
    """``memory`` in elements that keep their bits, whatever they mean; in its own shape if it does not fit."""
    itemsize = DTYPES[target.dtype]
    if isinstance(memory, memoryview):
        array = np.frombuffer(memory, np.uint8)
        fits = array.nbytes == math.prod(target.shape) * itemsize
        return array.view(_UNITS[itemsize]).reshape(target.shape) if fits else array
    return memory.view(_UNITS[itemsize]) if memory.itemsize == itemsize else memory
