"""Host memory that a GPU copies to and from by itself, of exactly the size that was asked for.

torch's own pinned memory is rounded up to a power of two, so that a pool of 130 GiB takes 256, and is never given
back. Here anonymous pages are registered with CUDA, and known to it until the last tensor that looks at them is gone.
A forked child does not see them, as it does not see CUDA's own: a page that both had would be copied when the parent
next writes to it, while the GPU goes on with the old one. Their addresses may be used by the child for something else,
so it never unmaps them.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

PORTABLE = 1
"""cudaHostRegisterPortable: known to the contexts of all devices"""


class _Registered(mmap.mmap):
    """Pages that go out of CUDA's books before they go."""

    unlock: Callable[[], None] | None = None
    pid = 0

    def __del__(self) -> None:
        if self.pid == 0:
            return
        if self.pid != os.getpid():  # one reference too many, so that nothing is unmapped
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        elif self.unlock is not None:
            self.unlock()


def page_locked(num_bytes: int, *, runtime: Any, synchronize: Callable[[], None]) -> mmap.mmap:
    """Page-locked memory, by the CUDA ``runtime``; before it goes, ``synchronize`` waits for what still copies.

    Raises:
        RuntimeError: the machine will not lock so much.
    """
    pages = _Registered(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    pages.pid = os.getpid()
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if error := int(runtime.cudaHostRegister(address, num_bytes, PORTABLE)):
        raise RuntimeError(f"CUDA cannot lock {num_bytes} bytes of host memory: error {error}")

    def unlock() -> None:
        synchronize()
        runtime.cudaHostUnregister(address)

    pages.unlock = unlock
    return pages
