"""What following an address plan costs a training step: steps under the plan against steps of torch's own allocator.

One model of six layers trains on one thread. A round is a turn without and a turn with the plan, in changing order, so
that both meet the same disturbances; each turn begins with a step that is not timed, in which a new arena gets its
pages. Ratios are taken round by round (``intervals.py``). What counts is CPU time, the kernel's included: a step on one
thread waits for nobody, so that on a quiet machine this is its time, and on a busy one it is still told apart from the
neighbours'. Beside it stand the ratio by the clock on the wall, and what one request costs, in nanoseconds: of a large
block from the arena, of one that falls back, and of a small one that passes by.

    python -m benchmarks.allocator [--quick] [--rounds N] [--json FILE]
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.activation.allocator import AllocationPlan, AllocationReport, PlannedAllocator

from .harness import Session, main
from .intervals import Interval, paired_ratio

MOST_OVERHEAD = 1.02
STEPS_PER_TURN = 3
NUM_REQUESTS = 20_000  # of a turn that times single requests
WIDTH, HEADS, NUM_LAYERS = 256, 4, 6


class Layer(nn.Module):
    """A transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """From [batch, length, WIDTH] to the same."""
        split = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.feed(self.between(x))  # type: ignore[no-any-return]


class Job:
    """The model under AdamW."""

    def __init__(self, *, length: int) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._x = torch.randn(1, length, WIDTH)
        self.step()  # makes the optimizer's state

    def step(self) -> None:
        """One training step."""
        self._optimizer.zero_grad()
        self._model(self._x).square().mean().backward()
        self._optimizer.step()

    @property
    def weights(self) -> list[Tensor]:
        """As they are now."""
        return [each.detach().clone() for each in self._model.parameters()]

    def plan(self) -> AllocationPlan:
        """The plan of its step."""
        with PlannedAllocator.record() as recording:
            for _ in range(2):
                self.step()
                recording.new_step()
        return recording.plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds of a step in each round, by CPU time and by the wall clock, and what became of the plan in the last."""

    plain_s: list[float]
    planned_s: list[float]
    plain_wall_s: list[float]
    planned_wall_s: list[float]
    report: AllocationReport

    @property
    def ratio(self) -> Interval:
        """Steps under the plan over plain ones."""
        return paired_ratio(self.planned_s, self.plain_s)

    @property
    def wall_ratio(self) -> Interval:
        """The same by the wall clock."""
        return paired_ratio(self.planned_wall_s, self.plain_wall_s)

    @property
    def resolved(self) -> float:
        """The ratio if the rounds tell on which side of the target it lies, otherwise NaN."""
        return self.ratio.resolved(at_least=MOST_OVERHEAD, allowed=MOST_OVERHEAD - 1)


def same_weights(*, steps: int, length: int) -> bool:
    """Whether training under the plan ends with the weights of training without, to the bit."""
    with one_thread():
        plain, planned = Job(length=length), Job(length=length)
        plan = planned.plan()
        for _ in range(2 + steps):  # the plan took two steps to record
            plain.step()
        with PlannedAllocator(plan) as allocator:
            for _ in range(steps):
                planned.step()
                allocator.new_step()
        return allocator.report().hits > 0 and all(map(torch.equal, plain.weights, planned.weights))


def allocator_overhead(*, rounds: int, length: int = 512) -> Overhead:
    """Measure both kinds of turns on one thread, so many rounds."""
    with one_thread():
        job = Job(length=length)
        plan = job.plan()
        allocator = PlannedAllocator(plan)
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(rounds):
            for is_planned in (False, True) if number % 2 else (True, False):
                with allocator if is_planned else nullcontext():
                    times[is_planned].append(_turn_s(job, allocator if is_planned else None))
    (plain, plain_wall), (planned, planned_wall) = (zip(*times[each], strict=True) for each in (False, True))
    return Overhead(
        plain_s=list(plain),
        planned_s=list(planned),
        plain_wall_s=list(plain_wall),
        planned_wall_s=list(planned_wall),
        report=allocator.report(),
    )


def _turn_s(job: Job, allocator: PlannedAllocator | None) -> tuple[float, float]:
    """CPU and wall seconds of a step, of several after one that does not count."""
    start, wall = 0.0, 0.0
    for number in range(1 + STEPS_PER_TURN):
        if number == 1:
            start, wall = time.process_time(), time.perf_counter()
        job.step()
        if allocator is not None:
            allocator.new_step()
    return (
        (time.process_time() - start) / STEPS_PER_TURN,
        (time.perf_counter() - wall) / STEPS_PER_TURN,
    )


def request_costs_ns(*, rounds: int) -> dict[str, Interval]:
    """What a request and its free cost under a plan more than without, for each way that they can go."""
    large, small = 8192, 64
    with PlannedAllocator.record() as recording:
        for _ in range(NUM_REQUESTS):
            torch.empty(large, dtype=torch.uint8)
    plan = recording.plan()
    sizes = {"from the arena": large, "fallen back": large + 64, "small, passing by": small}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
    with one_thread():
        for _ in range(rounds):
            for name, size in sizes.items():
                plain = _requests_s(size)
                with PlannedAllocator(plan):
                    costs[name].append((plain, _requests_s(size)))
    return {
        name: _shifted([1e9 * (planned - plain) / NUM_REQUESTS for plain, planned in pairs])
        for name, pairs in costs.items()
    }


def _shifted(differences: list[float]) -> Interval:
    """Median and bounds of differences, as those of ratios to 1."""
    return paired_ratio(differences, [1.0] * len(differences))


def _requests_s(size: int) -> float:
    empty: Callable[..., Tensor] = torch.empty
    start = time.process_time()
    for _ in range(NUM_REQUESTS):
        empty(size, dtype=torch.uint8)
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, as a rank has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(session: Session) -> None:
    """Measure steps and single requests, after a look at what they end with."""
    length = 64 if session.quick else 512
    if not same_weights(steps=STEPS_PER_TURN, length=length):
        session.failed.append("training under the plan ends with other weights")
    rows = session.part(
        "steps", lambda: [_steps_row(allocator_overhead(rounds=session.rounds, length=length))]
    )
    for row in rows:
        session.row(**row)
    overhead = paired_ratio(rows[0]["planned_s"], rows[0]["plain_s"])
    session.metric(
        "allocator_overhead",
        overhead.resolved(at_least=MOST_OVERHEAD, allowed=MOST_OVERHEAD - 1),
        at_most=MOST_OVERHEAD,
        note=str(overhead),
    )
    session.metric("hit_rate", rows[0]["hit_rate"], at_least=1.0)
    for name, cost in request_costs_ns(rounds=session.rounds).items():
        session.row(request=name, more_ns=cost.median, low_ns=cost.low, high_ns=cost.high)
    if rows[0]["hit_rate"] < 1:
        session.failed.append("the plan of a step that repeats itself was not followed")


def _steps_row(overhead: Overhead) -> dict[str, object]:
    return {
        "requests": overhead.report.hits // (1 + STEPS_PER_TURN),
        "arena_mib": overhead.report.arena_bytes / 2**20,
        "hit_rate": overhead.report.hit_rate,
        "planned_over_plain": str(overhead.ratio),
        "by_the_wall_clock": str(overhead.wall_ratio),
        "plain_s": overhead.plain_s,
        "planned_s": overhead.planned_s,
    }


if __name__ == "__main__":
    main("allocator", run, rounds=21)
