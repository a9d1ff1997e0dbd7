"""Memory that outlives the processes which write to it: a file without a name, handed from process to process.

A memfd has no path that a crash could leave behind or a clean-up could take away (POSIX shared memory has both
troubles), needs no space in /dev/shm, and lives as long as anybody has it open. Fresh pages are what costs: they are
allocated ahead by whoever makes the memory, and every process that maps it has its page table filled ahead.
"""

import ctypes
import fcntl
import mmap
import os
from contextlib import suppress

import numpy as np

NAME = "distrain"
AT_ONCE = 16 << 20
"""bytes between two looks at whether to go on"""

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = (
    0x1 | 0x2 | 0x4
)  # no more seals, no shrinking (a process that has it mapped would get SIGBUS), no growing
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23


def create(nbytes: int) -> int:
    """A descriptor of new memory of a fixed size, not yet allocated."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    return fd


def is_ours(fd: int, *, nbytes: int) -> bool:
    """Whether ``fd`` is memory as ``create`` makes it, of this size."""
    try:
        sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False
    return sealed and os.fstat(fd).st_size == nbytes


def read_only(fd: int) -> int:
    """Another descriptor of the same memory, through which it cannot be changed."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class Mapping:
    """Memory of a descriptor, mapped; it stays mapped as long as views of it are in use."""

    def __init__(self, fd: int, *, nbytes: int, writable: bool = True) -> None:
        """The descriptor is not needed any more afterwards."""
        self._writable = writable
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, nbytes, access=access)
        with suppress(OSError):  # for kernels that give large pages to shared memory on advice
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        """all of it"""

    def populate(self, start: int, nbytes: int) -> None:
        """Fill the page table, so that no first touch is slow; where the kernel cannot (before 5.14) it stays as is."""
        advice = _MADV_POPULATE_WRITE if self._writable else _MADV_POPULATE_READ
        libc = ctypes.CDLL(None, use_errno=True)
        address = int(np.frombuffer(self.view, np.uint8).ctypes.data) + start
        # Not mmap.madvise: that keeps the interpreter's lock all the while.
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)

    def close(self) -> None:
        """Unmap now if nobody uses a view of it, otherwise with the last view."""
        with suppress(BufferError):
            self.view.release()
            self._map.close()
