"""Host memory that a GPU copies to and from by itself, of exactly the size that was asked for.

torch's own pinned memory is rounded up to a power of two, so that a pool of 130 GiB takes 256, and is never given
back. Here anonymous pages are registered with CUDA, and known to it until the last tensor that looks at them is gone.
A forked child does not see them, as it does not see CUDA's own: a page that both had would be copied when the parent
next writes to it, while the GPU goes on with the old one.
"""

import mmap
import os
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

PORTABLE = 1
"""cudaHostRegisterPortable: known to the contexts of all devices"""


class _Registered(mmap.mmap):
    """Pages that go out of CUDA's books before they go."""

    unlock: Callable[[], None] | None = None
    pid = 0

    def __del__(self) -> None:
        if self.unlock is not None and self.pid == os.getpid():
            self.unlock()


def page_locked(*shape: int, dtype: torch.dtype, synchronize: Callable[[], None]) -> Tensor:
    """A tensor in page-locked memory; before that goes, ``synchronize`` waits for what still copies.

    Raises:
        RuntimeError: the machine will not lock so much.
    """
    numel = prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    num_bytes = numel * dtype.itemsize
    pages = _Registered(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    address = tensor.data_ptr()
    runtime: Any = torch.cuda.cudart()
    if error := int(runtime.cudaHostRegister(address, num_bytes, PORTABLE)):
        raise RuntimeError(f"CUDA cannot lock {num_bytes} bytes of host memory: error {error}")

    def unlock() -> None:
        synchronize()
        runtime.cudaHostUnregister(address)

    pages.unlock, pages.pid = unlock, os.getpid()
    return tensor.view(shape)
