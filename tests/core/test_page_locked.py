"""Page-locked memory, with books of CUDA's that are kept here: exact sizes, and nothing is left in them."""

import gc
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
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    made = Books(limit=2**22)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def test_exactly_what_was_asked_for_is_locked_until_the_last_look_at_it_is_gone(books: Books) -> None:
    memory = page_locked(3, 100_001, dtype=torch.bfloat16, synchronize=books.synchronize)
    assert (memory.shape, memory.dtype) == ((3, 100_001), torch.bfloat16)
    assert books.known == {memory.data_ptr(): 3 * 100_001 * 2}
    memory.fill_(2)
    part = memory[1, 5:7]
    del memory
    gc.collect()
    assert part.tolist() == [2, 2] and len(books.known) == 1
    del part
    gc.collect()
    assert not books.known
    assert books.waited_with == [1], "for copies on their way, before the pages go"
    assert page_locked(0, dtype=torch.uint8, synchronize=books.synchronize).numel() == 0


def test_what_the_machine_will_not_lock_is_refused_and_left_alone(books: Books) -> None:
    with pytest.raises(RuntimeError, match="cannot lock 8388608 bytes of host memory"):
        page_locked(2**23, dtype=torch.uint8, synchronize=books.synchronize)
    gc.collect()
    assert not books.known


def test_a_forked_child_does_not_unlock_what_is_its_parent_s(books: Books) -> None:
    memory = page_locked(16, dtype=torch.uint8, synchronize=books.synchronize)
    if (child := os.fork()) == 0:
        code = 1
        try:
            del memory
            gc.collect()
            code = 0 if books.known else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert books.known == {memory.data_ptr(): 16}
