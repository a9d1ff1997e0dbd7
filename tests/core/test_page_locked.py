"""Page-locked memory, with books of CUDA's that are kept here: exact sizes, and nothing is left in them."""

import ctypes
import gc
import mmap
import os

import pytest
import torch

from distrain.core.page_locked import page_locked


class Books:
    """What CUDA knows of the host's memory."""

    def __init__(self, *, limit: int = 2**40) -> None:
        self.known: dict[int, int] = {}
        self.waited_with: list[int] = []
        self.limit = limit

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if num_bytes > self.limit:
            return 2
        self.known[address] = num_bytes
        return 0

    def synchronize(self) -> None:
        self.waited_with.append(len(self.known))

    def cudaHostUnregister(self, address: int) -> int:
        del self.known[address]
        return 0


@pytest.fixture
def books() -> Books:
    return Books(limit=2**22)


def locked(num_bytes: int, books: Books) -> torch.Tensor:
    pages = page_locked(num_bytes, runtime=books, synchronize=books.synchronize)
    return torch.frombuffer(pages, dtype=torch.uint8)


def test_exactly_what_was_asked_for_is_locked_until_the_last_look_at_it_is_gone(books: Books) -> None:
    memory = locked(300_003, books)
    assert books.known == {memory.data_ptr(): 300_003} and memory.numel() == 300_003
    memory.fill_(2)
    part = memory[5:7]
    del memory
    gc.collect()
    assert part.tolist() == [2, 2] and len(books.known) == 1
    del part
    gc.collect()
    assert not books.known
    assert books.waited_with == [1], "for copies on their way, before the pages go"


def test_what_the_machine_will_not_lock_is_refused_and_left_alone(books: Books) -> None:
    with pytest.raises(RuntimeError, match="cannot lock 8388608 bytes of host memory"):
        locked(2**23, books)
    gc.collect()
    assert not books.known


def test_a_forked_child_neither_unlocks_nor_unmaps_what_is_its_parent_s(books: Books) -> None:
    memory = locked(16, books)
    if (child := os.fork()) == 0:
        code = 1
        try:
            address = memory.data_ptr()
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            rights = mmap.PROT_READ | mmap.PROT_WRITE
            own = libc.mmap(
                ctypes.c_void_p(address), ctypes.c_size_t(4096), rights, fixed, -1, ctypes.c_long(0)
            )
            ctypes.memset(own, 7, 16)
            del memory
            gc.collect()
            code = 0 if books.known and ctypes.string_at(own, 16) == bytes([7] * 16) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert books.known == {memory.data_ptr(): 16}
