"""The context of the planned allocator: threads, forks and phases, small requests, one context at a time."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from distrain.activation.allocator import PlannedAllocator, bind
from distrain.core.errors import ConfigError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def _nothing_is_on() -> Iterator[None]:
    before = bind.cpu_library().distrain_num_arenas()
    yield
    assert not bind.cpu_library().distrain_is_on()
    assert bind.cpu_library().distrain_num_arenas() == before


def test_requests_of_other_threads_fall_back_and_may_be_freed_anywhere() -> None:
    sizes = [5000, 6000, 7000]

    def ask() -> list[Tensor]:
        return [torch.full((size,), size % 251, dtype=torch.uint8) for size in sizes]

    with PlannedAllocator.record() as recording:
        ask()
    with PlannedAllocator(recording.plan()) as allocator:
        theirs: list[Tensor] = []
        thread = threading.Thread(target=lambda: theirs.extend(ask()))
        thread.start()
        thread.join()
        ours = ask()
        report = allocator.report()
        assert (report.hits, report.elsewhere, report.fallback_bytes) == (3, 3, sum(sizes))
        assert all(
            bool((each == size % 251).all()) for each, size in zip(ours + theirs, sizes * 2, strict=True)
        )
        thread = threading.Thread(target=ours.clear)
        thread.start()
        thread.join()
        theirs.clear()
        report = allocator.report()
        assert (report.foreign_frees, report.live_blocks, report.fallback_bytes) == (3, 0, 0)
        allocator.new_step()
        ours = ask()
        assert allocator.report().hits == 6


def test_a_fork_goes_on_without_the_plan_and_hurts_nobody() -> None:
    def ask(value: int) -> list[Tensor]:
        return [torch.full((size,), value, dtype=torch.uint8) for size in (5000, 6000)]

    with PlannedAllocator.record() as recording:
        ask(0)
    with PlannedAllocator(recording.plan()) as allocator:
        kept = ask(1)
        if (child := os.fork()) == 0:
            code = 1
            try:
                fine = all_are(kept, 1)
                kept.clear()
                more = ask(2)
                fine &= all_are(more, 2)
                fine &= allocator.report().hits == 0
                code = 0 if fine else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all_are(kept, 1)
        report = allocator.report()
        assert (report.hits, report.live_blocks, report.misses) == (2, 2, 0)


def test_a_fork_finds_the_allocator_in_order_whatever_other_threads_are_doing() -> None:
    with PlannedAllocator.record() as recording:
        torch.empty(2**13)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            torch.empty(2**13)

    with PlannedAllocator(recording.plan()):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                if (child := os.fork()) == 0:
                    torch.empty(2**13)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def all_are(tensors: list[Tensor], value: int) -> bool:
    return all(int(each.min()) == value == int(each.max()) for each in tensors)  # asks for nothing large


def test_small_requests_pass_by() -> None:
    with PlannedAllocator.record(min_bytes=4096) as recording:
        tensors = [torch.empty(4095, dtype=torch.uint8), torch.empty(4096, dtype=torch.uint8)]
    assert [each.size for each in recording.steps[0]] == [4096]
    del tensors
    with PlannedAllocator(recording.plan()) as allocator:
        torch.empty(100)
        assert allocator.report().misses == 0


def test_one_at_a_time() -> None:
    with PlannedAllocator.record() as recording:
        with pytest.raises(ConfigError, match="is on already"), PlannedAllocator.record():
            pass
        torch.empty(2**14)
    assert len(recording.steps[0]) == 1
    with pytest.raises(ConfigError, match="not on"):
        recording.new_step()


def test_phases_keep_their_own_positions() -> None:
    def step(enter: Callable[[int], None], *, astray: bool) -> None:
        enter(1)
        alive = [torch.empty(size, dtype=torch.uint8) for size in (5000, 6000, 7000)]
        if astray:
            alive += [torch.empty(size, dtype=torch.uint8) for size in (5500, 9000, 5000, 5000, 5000)]
        enter(2)
        alive += [torch.empty(size, dtype=torch.uint8) for size in (5000, 6000)]
        enter(1)
        alive.append(torch.empty(8000, dtype=torch.uint8))

    with PlannedAllocator.record() as recording:
        step(recording.enter_phase, astray=False)
    with PlannedAllocator(recording.plan()) as allocator:
        step(allocator.enter_phase, astray=True)
        report = allocator.report()
        assert (report.hits, report.extra, report.skipped) == (6, 5, 0)
