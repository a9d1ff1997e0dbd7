"""A rank as a device of fixed speed, so that makespan shows with more ranks than cores.

Eight processes on two cores share whatever is idle: a plan that gives all the work to one of them costs hardly more
wall-clock time than a balanced one. Here each rank may use ``0.9 x cores / world_size`` of a core and no more, whatever
the others do, as a GPU cannot borrow time from its neighbour::

    shared cores    rank 0 ████████           fixed speed    rank 0 ████████████████
                    rank 1 (idle)                            rank 1 (idle)

The kernel does it where a cgroup with a CPU quota can be made (version 1 or 2). Elsewhere a thread stops each rank by a
signal as soon as it has used its time and lets it go on when it has earned some again: sleeps of calibrated length
during compute, coarser, but for any program and without rights. ``FixedSpeed.kind`` says which one it was.

``python -m benchmarks.fixed_speed`` measures that a plan skewed 4 to 1 takes more than three times as long.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Protocol

from distrain.launch.tether import tie_to_parent

from .cgroups import Cgroups, find_controller
from .harness import Session, main
from .pacing import Signals

PERIOD_S = 0.01
USABLE = 0.9  # the rest is for the kernel and whoever measures


class FixedSpeed(Protocol):
    """Devices of one speed; a process that joins one shares its speed with the others there."""

    kind: str
    """how the speed is kept, for the report"""
    quota: float
    """cores that each device may use"""

    def join(self, device: int, pid: int) -> None:
        """Put the process ``pid``, with its threads and future children, on ``device``."""


@contextmanager
def fixed_speed(num_devices: int, *, signals: bool = False) -> Iterator[FixedSpeed]:
    """Devices that exist until the block ends, however it ends; ``signals`` does without cgroups.

    Processes that are still on a device then get full speed again.
    """
    quota = USABLE * len(os.sched_getaffinity(0)) / num_devices
    controller = None if signals else find_controller()
    if controller:
        devices: Cgroups | Signals = Cgroups(controller, num_devices, quota=quota, period_s=PERIOD_S)
    else:
        devices = Signals(num_devices, quota=quota, period_s=PERIOD_S)
    with devices:
        yield devices


BALANCED = (1, 1, 1, 1)
SKEWED = (4, 0, 0, 0)


def makespan_s(devices: FixedSpeed, plan: Sequence[int], *, loops: int) -> float:
    """Wall-clock time until each rank has done its share of ``plan``, in units of ``loops``."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(len(plan) + 1), context.Queue()
    ranks = [context.Process(target=_work, args=(barrier, done, units * loops)) for units in plan]
    try:
        for device, rank in enumerate(ranks):
            rank.start()
            assert rank.pid is not None
            devices.join(device, rank.pid)
        barrier.wait(timeout=60)
        start = time.perf_counter()
        ends: list[float] = [done.get(timeout=60) for _ in ranks]
        return max(ends) - start
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _work(barrier: Barrier, done: "Queue[float]", loops: int) -> None:
    tie_to_parent(os.getppid())
    barrier.wait(timeout=60)
    total = 0
    for i in range(loops):
        total += i * i
    done.put(time.perf_counter())  # one clock for all processes of a machine


def skew_ratio(devices: FixedSpeed, *, rounds: int, loops: int) -> float:
    """How much longer the skewed plan takes than the balanced one, both at their best.

    The best of several, not the median: a disturbance can only lengthen a run, and it lengthens the balanced one, which
    needs all cores, far more than the skewed one, so that medians on a busy machine would tell of its load.
    """
    times = [[makespan_s(devices, plan, loops=loops) for plan in (BALANCED, SKEWED)] for _ in range(rounds)]
    balanced, skewed = (min(column) for column in zip(*times, strict=True))
    return float(skewed / balanced)


def run(session: Session) -> None:
    """Measure the skew ratio of each way to keep the speed that this machine allows."""
    loops = 500_000 if session.quick else 6_000_000
    for signals in (False, True):
        with fixed_speed(len(BALANCED), signals=signals) as devices:
            ratio = skew_ratio(devices, rounds=session.rounds, loops=loops)
            session.row(speed=devices.kind, cores=devices.quota, skewed_over_balanced=ratio)
            if not signals:
                session.metric("skewed_over_balanced", ratio, at_least=3.0, note=devices.kind)


if __name__ == "__main__":
    main("fixed_speed", run)
