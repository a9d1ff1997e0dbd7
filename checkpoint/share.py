"""Reads what several ranks of a node need once for all of them.

Replicas, and tensor-parallel ranks that cut a tensor elsewhere than it is stored, need the same extents. Each rank
reads and verifies some of them into memory that all ranks of the node have mapped, and takes from there what it needs.
The window holds two rounds: while the extents of one are scattered, those of the next are read::

    round       0              1              2
    half 0   read 0..7   |  scatter 0..7  |  read 16..23
    half 1               |  read 8..15    |  scatter 8..15
                      all wait           all wait

What only one rank needs it reads by itself. Without a window that all can open, everybody does.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from distrain.core import shared_memory
from distrain.core.errors import DataError

from .layout import STRIDE
from .load_plan import LoadPlan, Read
from .ranks import Ranks
from .reshard import NUM_THREADS, Memory, Open, Writers, execute, memory_of, scatter

MAX_ROUND = 16
"""extents in one half of the window"""

Extent = tuple[int, int]
"""writer and number"""


def execute_together(
    load_plan: LoadPlan,
    open_writer: Open,
    out: Sequence[Memory],
    *,
    node: Ranks,
    num_threads: int = NUM_THREADS,
) -> None:
    """As ``execute``, by all ranks of a node at once, which open the same writers; an extent is read by one of them.

    Readers must fill the buffer they are given, as those of blobs do.

    Raises:
        ConfigError: memory does not fit its target (lists all).
        DataError: an extent that any of them needs is damaged.
    """
    if node.world_size > 1:
        views = memory_of(load_plan.targets, out)
        reads = {(read.writer, read.extent): read for read in load_plan.reads}
        shared = _shared(node.gather(list(reads)))
        per_round = min(MAX_ROUND, node.world_size * num_threads)
        with _window(node, 2 * per_round) if shared else nullcontext() as window:
            if window is not None:
                rounds = [shared[start : start + per_round] for start in range(0, len(shared), per_round)]
                _Exchange(rounds, window, reads, views).run(node, open_writer, num_threads)
                for extent in shared:
                    reads.pop(extent, None)
        load_plan = replace(load_plan, reads=tuple(reads.values()))
    execute(load_plan, open_writer, out, num_threads=num_threads)


class _Exchange:
    """Extents that several ranks want, round by round through the window."""

    def __init__(
        self,
        rounds: Sequence[Sequence[Extent]],
        window: memoryview,
        reads: Mapping[Extent, Read],
        views: Sequence[NDArray[Any]],
    ) -> None:
        self._rounds, self._window, self._reads, self._views = rounds, window, reads, views
        self._half = len(window) // 2

    def run(self, node: Ranks, open_writer: Open, num_threads: int) -> None:
        """Read this rank's part of each round, and take what it wants of the one before."""
        with (
            Writers(open_writer) as writers,
            ThreadPoolExecutor(num_threads, thread_name_prefix="load") as pool,
        ):
            for number in range(len(self._rounds) + 1):
                jobs: list[Callable[[], None]] = []
                if number < len(self._rounds):
                    mine = range(node.rank, len(self._rounds[number]), node.world_size)
                    jobs += [partial(self._read, writers, number, place) for place in mine]
                if number:
                    jobs += [partial(self._take, number - 1, i) for i in range(len(self._rounds[number - 1]))]
                _agree(node, _first_error(pool, jobs))
                writers.keep({writer for each in self._rounds[number : number + 1] for writer, _ in each})

    def _read(self, writers: Writers, number: int, place: int) -> None:
        writer, extent = self._rounds[number][place]
        writers.open(writer).read(extent, self._slot(number, place))

    def _take(self, number: int, place: int) -> None:
        if read := self._reads.get(self._rounds[number][place]):
            scatter(read, self._slot(number, place), self._views)

    def _slot(self, number: int, place: int) -> memoryview:
        start = number % 2 * self._half + place * STRIDE
        return self._window[start : start + STRIDE]


def _shared(wanted: Sequence[Sequence[Sequence[int]]]) -> list[Extent]:
    """What more than one rank wants, in the order in which it lies."""
    counts = Counter((writer, extent) for each in wanted for writer, extent in each)
    return sorted(extent for extent, count in counts.items() if count > 1)


def _first_error(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], None]]) -> str:
    """What the first job that failed says, once all have ended."""
    futures = [pool.submit(job) for job in jobs]
    errors = [future.exception() for future in futures]
    return next((str(error) or repr(error) for error in errors if error), "")


def _agree(node: Ranks, error: str) -> None:
    """Wait for all; DataError on all if one has an error."""
    if found := next((each for each in node.gather(error) if each), ""):
        raise DataError("an extent that the ranks of this node share cannot be read", got=found)


@contextmanager
def _window(node: Ranks, num_extents: int) -> Iterator[memoryview | None]:
    """Memory that all ranks of the node have mapped; None if one of them cannot."""
    nbytes = num_extents * STRIDE
    fd, where = -1, ""
    if node.rank == 0:
        with suppress(OSError):
            fd = shared_memory.create(nbytes)
            where = f"/proc/{os.getpid()}/fd/{fd}"
    where = node.first(where)
    if node.rank and where:
        with suppress(OSError):
            fd = os.open(where, os.O_RDWR | os.O_CLOEXEC)
    try:
        if node.all_true(fd >= 0 and shared_memory.is_ours(fd, nbytes=nbytes)):
            mapping = shared_memory.Mapping(fd, nbytes=nbytes)
            yield mapping.view
            mapping.close()
        else:
            yield None
    finally:
        if fd >= 0:
            os.close(fd)
