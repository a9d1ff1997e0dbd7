"""Programs that leave their plan in every way: no block ever changes under its owner, and every request is counted."""

import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrain.activation.allocator import AllocationPlan, AllocationReport, PlannedAllocator, Recording

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LEAST = 64
SIZES = (64, 65, 100, 128, 200, 1000)


@dataclass(frozen=True)
class Ask:
    """A request; ``elsewhere`` makes it on another thread."""

    size: int
    elsewhere: bool = False


@dataclass(frozen=True)
class Free:
    """Give back one of the living blocks, the ``which``-th if there are enough."""

    which: int
    elsewhere: bool = False


@dataclass(frozen=True)
class Enter:
    """Begin a phase."""

    phase: int


class NewStep:
    """The step is over."""


Operation = Ask | Free | Enter | NewStep

asks = st.builds(Ask, st.sampled_from(SIZES))
frees = st.builds(Free, st.integers(0, 40))
steps = st.lists(asks | asks | frees | st.builds(Enter, st.integers(0, 2)), min_size=1, max_size=40)
strange = (
    st.builds(Ask, st.sampled_from((*SIZES, 77, 5000)), st.booleans())
    | st.builds(Free, st.integers(0, 40), st.booleans())
    | st.builds(Enter, st.integers(0, 4))
    | st.builds(NewStep)
)


def empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@dataclass
class Program:
    """Runs operations; each block holds a value of its own, which is checked until it is freed."""

    context: PlannedAllocator | Recording
    pool: ThreadPoolExecutor
    alive: list[tuple[Tensor, int]] = field(default_factory=list)
    num_asked: int = 0

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            match operation:
                case Ask(size, elsewhere):
                    self.num_asked += 1
                    value = self.num_asked % 251
                    block = self.pool.submit(empty, size).result() if elsewhere else empty(size)
                    assert block.data_ptr() % 64 == 0
                    self.alive.append((block.fill_(value), value))
                case Free(which, elsewhere):
                    if self.alive:
                        taken = [self.alive.pop(which % len(self.alive))]
                        assert int(taken[0][0].min()) == taken[0][1] == int(taken[0][0].max())
                        if elsewhere:
                            self.pool.submit(taken.clear).result()
                case Enter(phase):
                    self.context.enter_phase(phase)
                case NewStep():
                    self.context.new_step()

    def check(self) -> None:
        for block, value in self.alive:
            assert int(block.min()) == value == int(block.max())


def planned(step: Sequence[Operation], pool: ThreadPoolExecutor) -> AllocationPlan:
    with PlannedAllocator.record(min_bytes=LEAST) as recording:
        program = Program(recording, pool)
        program.run([*step, NewStep(), *step])
    return recording.plan()


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.get_ident).result()
        yield pool


@given(step=steps, edits=st.lists(st.tuples(st.integers(0, 120), st.none() | strange), max_size=30))
def test_no_program_hurts_its_blocks_whatever_plan_it_runs_under(
    pool: ThreadPoolExecutor, step: list[Operation], edits: list[tuple[int, Operation | None]]
) -> None:
    """The steps of the plan, with operations dropped (None) and put in."""
    plan = planned(step, pool)
    operations: list[Operation] = [*step, NewStep(), *step, NewStep(), *step]
    for place, operation in edits:
        place %= len(operations) + 1
        operations[place : place + 1] = (
            [] if operation is None else [operation, *operations[place : place + 1]]
        )
    with PlannedAllocator(plan) as allocator:
        program = Program(allocator, pool)
        program.run(operations)
        program.check()
        report = allocator.report()
    program.check()  # they outlive the context
    assert report.hits + report.unplanned + report.misses == program.num_asked
    assert report.live_bytes + report.fallback_bytes == sum(block.numel() for block, _ in program.alive)
    assert report.top_bytes <= plan.arena_bytes


@given(step=steps)
def test_a_program_that_keeps_to_its_plan_never_misses(
    pool: ThreadPoolExecutor, step: list[Operation]
) -> None:
    plan = planned(step, pool)
    with PlannedAllocator(plan) as allocator:
        program = Program(allocator, pool)
        program.run([*step, NewStep()])
        program.check()
        program.alive.clear()  # or the next step's frees would take other blocks
        program.run([*step, NewStep()])
        report = allocator.report()
    assert (report.misses, report.skipped, report.resyncs) == (0, 0, 0)
    assert report.hits == 2 * sum(place.offset is not None for place in plan.places)


def test_threads_in_each_others_way_hurt_nobody() -> None:
    drawn = random.Random(7)
    step = [
        Ask(drawn.choice(SIZES)) if drawn.random() < 0.6 else Free(drawn.randrange(20)) for _ in range(300)
    ]
    num_asked: list[int] = []

    def work(seed: int, shared: list[tuple[Tensor, int]]) -> None:
        random_here, num = random.Random(seed), 0
        mine: list[tuple[Tensor, int]] = []
        for _ in range(2500):
            if random_here.random() < 0.55 or not mine:
                num += 1
                value = random_here.randrange(256)
                mine.append((torch.full((random_here.choice(SIZES),), value, dtype=torch.uint8), value))
            else:
                block, value = mine.pop(random_here.randrange(len(mine)))
                assert int(block.min()) == value == int(block.max())
                del block
        shared.extend(mine)  # freed by the main thread
        num_asked.append(num)

    with ThreadPoolExecutor(1) as pool:
        plan = planned(step, pool)
    left: list[tuple[Tensor, int]] = []
    with PlannedAllocator(plan) as allocator, ThreadPoolExecutor(3) as pool:
        others = [pool.submit(work, seed, left) for seed in range(3)]
        program = Program(allocator, pool)
        for _ in range(5):
            program.run(step)
            program.check()
            program.alive.clear()
            allocator.new_step()
        for other in others:
            other.result()
        Program(allocator, pool, alive=left).check()
        left.clear()
        report: AllocationReport = allocator.report()
    assert report.elsewhere == sum(num_asked)
    assert report.hits + report.unplanned == program.num_asked
    assert (report.live_bytes, report.fallback_bytes) == (0, 0)
