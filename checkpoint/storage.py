"""What a medium must be able to do to hold checkpoints.

Everything above speaks of files by relative paths with ``/``, and says when something has to be durable; where and
how is the medium's affair (``tiers/``). All operations raise StorageError where the medium refuses.
"""

import contextlib
import mmap
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np

_LARGE_PAGE = 2 << 20


class Sink(Protocol):
    """A file that is being written. As a context manager it is abandoned unless it was finished."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``; from any thread, fastest from page-aligned memory."""

    def finish(self, *, nbytes: int) -> None:
        """Cut the file at ``nbytes``, make its content durable and close it."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Source(Protocol):
    """A file that is being read."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; from any thread, fastest into page-aligned memory.

        Raises:
            DamageError: the file ends before.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Storage(Protocol):
    """A folder on some medium."""

    @property
    def name(self) -> str:
        """How people call it: a path or an address."""

    @property
    def atomic_rename(self) -> bool:
        """Whether ``rename`` of a folder happens at once or not at all; object stores cannot."""

    def names(self, folder: str = "") -> Sequence[str]:
        """Names in ``folder``, sorted; none if there is no such folder."""

    def read(self, path: str, *, limit_bytes: int) -> bytes | None:
        """The whole file; None if there is none.

        Raises:
            DamageError: it is larger than ``limit_bytes``.
        """

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a whole file at once: a reader sees the old or the new one. Its content is durable."""

    def sink(self, path: str, *, nbytes: int) -> Sink:
        """Begin to write a file of about ``nbytes``."""

    def source(self, path: str) -> Source:
        """Open a file for reading.

        Raises:
            DamageError: there is none.
        """

    def make_folder(self, path: str) -> None:
        """Create a folder and those above it, where there are none."""

    def sync(self, folder: str = "") -> None:
        """Make the names in ``folder`` durable."""

    def rename(self, old: str, new: str) -> None:
        """Rename a folder to a name that does not exist, or a file, which may replace another."""

    def remove(self, path: str) -> None:
        """Delete a file, or a folder and all below it; nothing happens if there is none."""


def aligned_memory(nbytes: int) -> memoryview:
    """Zeroed memory that begins on a page, for O_DIRECT; of large pages where the kernel has them.

    A disk fills large pages up to twice as fast. They are aligned, and anonymous memory that is shared has none.
    """
    memory = mmap.mmap(-1, nbytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -int(np.frombuffer(memory, np.uint8).ctypes.data) % _LARGE_PAGE
    return memoryview(memory)[start : start + nbytes]
