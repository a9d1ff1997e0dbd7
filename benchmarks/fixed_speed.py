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

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Protocol

from .harness import Session, main

PERIOD_S = 0.01
USABLE = 0.9  # the rest is for the kernel and whoever measures
WEIGHT = 10  # times the weight of other groups: a device should not slow down because somebody else compiles
PREFIX = "distrain-speed"


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
    with _Cgroups(controller, num_devices, quota) if controller else _Signals(num_devices, quota) as devices:
        yield devices


# -- by the kernel ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Controller:
    """A folder of cgroups below which groups with a CPU quota can be made."""

    root: Path
    version: int

    def create(self, name: str, quota: float) -> Path:
        """A new group limited to ``quota`` cores. OSError if that is not possible."""
        group = self.root / name
        group.mkdir()
        period, budget = int(PERIOD_S * 1e6), int(PERIOD_S * 1e6 * quota)
        try:
            if self.version == 1:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(budget))
                (group / "cpu.shares").write_text(str(1024 * WEIGHT))
            else:
                (group / "cpu.max").write_text(f"{budget} {period}")
                (group / "cpu.weight").write_text(str(100 * WEIGHT))
        except OSError:
            group.rmdir()
            raise
        return group

    def remove(self, group: Path) -> None:
        """Move what still runs in ``group`` out of it and delete it."""
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has just ended
                (self.root / "cgroup.procs").write_text(pid)
        deadline = time.monotonic() + 2.0
        while True:
            try:
                return group.rmdir()
            except OSError:  # busy until the kernel has buried the last dead
                if time.monotonic() > deadline:
                    raise
                time.sleep(PERIOD_S)


def find_controller(mounts: Path = Path("/sys/fs/cgroup")) -> Controller | None:
    """The CPU controller that this process may use, if any; what earlier owners left behind there is removed."""
    for controller in _candidates(mounts):
        try:
            probe = controller.create(f"{PREFIX}-{os.getpid()}-probe", 0.5)
        except OSError:
            continue
        controller.remove(probe)
        _sweep(controller)
        return controller
    return None


def _candidates(mounts: Path) -> Iterator[Controller]:
    for name in ("cpu", "cpu,cpuacct"):
        if (mounts / name / "cpu.cfs_quota_us").exists() or (mounts / name / "cgroup.procs").exists():
            yield Controller(mounts / name, 1)
    if not (mounts / "cgroup.controllers").exists():
        return
    # Version 2 wants processes at the leaves only, so the nearest ancestor that accepts a group is the place.
    own = mounts / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    for folder in (own, *own.parents):
        if not folder.is_relative_to(mounts):
            return
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text("+cpu")
        yield Controller(folder, 2)


def _sweep(controller: Controller) -> None:
    """Delete groups whose owner is gone: nobody cleans up after a SIGKILL but the next one."""
    for group in controller.root.glob(f"{PREFIX}-*"):
        owner = group.name.removeprefix(f"{PREFIX}-").split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                controller.remove(group)


class _Cgroups:
    def __init__(self, controller: Controller, num_devices: int, quota: float) -> None:
        self.kind = f"cgroup v{controller.version}"
        self.quota = quota
        self._controller = controller
        self._num_devices = num_devices
        self._groups: list[Path] = []

    def __enter__(self) -> "_Cgroups":
        try:
            for device in range(self._num_devices):
                name = f"{PREFIX}-{os.getpid()}-{id(self):x}-{device}"
                self._groups.append(self._controller.create(name, self.quota))
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._groups:
            self._controller.remove(self._groups.pop())

    def join(self, device: int, pid: int) -> None:
        (self._groups[device] / "cgroup.procs").write_text(str(pid))


# -- by signals ------------------------------------------------------------------------------------------------------


class _Process:
    """A process on a device, held by a descriptor so that no later process of the same number is ever hit."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)
        self._clock = (~pid << 3) | 2  # the kernel's number for that process's CPU clock
        self._seen_s = time.clock_gettime(self._clock)
        self._is_stopped = False

    def spent_s(self) -> float:
        """CPU time of all its threads since the last call. OSError when it has ended."""
        now = time.clock_gettime(self._clock)
        spent, self._seen_s = now - self._seen_s, now
        return spent

    def run(self, allowed: bool) -> None:
        """Let it run or stop it. OSError when it has ended."""
        if allowed is self._is_stopped:
            signal.pidfd_send_signal(self._fd, signal.SIGCONT if allowed else signal.SIGSTOP)
            self._is_stopped = not allowed

    def release(self) -> None:
        """Let it run for good."""
        with contextlib.suppress(OSError):
            self.run(True)
        os.close(self._fd)


@dataclass(slots=True)
class _Paced:
    """One device: its processes and the CPU time that they may still use; below zero they are stopped."""

    processes: list[_Process]
    credit_s: float = 0.0

    def settle(self, earned_s: float, most_s: float) -> None:
        """Add what was earned, take off what was used, stop or resume, and let go of what has ended."""
        self.credit_s = min(self.credit_s + earned_s, most_s)
        living = []
        for process in self.processes:
            try:
                self.credit_s -= process.spent_s()
                living.append(process)
            except OSError:
                process.release()
        self.processes = living
        for process in living:
            with contextlib.suppress(OSError):
                process.run(self.credit_s >= 0)


class _Signals:
    def __init__(self, num_devices: int, quota: float) -> None:
        self.kind = "stopped by signals"
        self.quota = quota
        self._devices = [_Paced([]) for _ in range(num_devices)]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pace, name="distrain-fixed-speed", daemon=True)

    def __enter__(self) -> "_Signals":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        for device in self._devices:
            for process in device.processes:
                process.release()

    def join(self, device: int, pid: int) -> None:
        with self._lock:
            self._devices[device].processes.append(_Process(pid))

    def _pace(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(PERIOD_S / 4):
            now = time.monotonic()
            earned, before = (now - before) * self.quota, now
            with self._lock:
                for device in self._devices:
                    device.settle(earned, PERIOD_S * self.quota)


# -- self-test -------------------------------------------------------------------------------------------------------

BALANCED = (1, 1, 1, 1)
SKEWED = (4, 0, 0, 0)


def makespan_s(devices: FixedSpeed, plan: Sequence[int], *, loops: int) -> float:
    """Wall-clock time until each rank has done its share of ``plan``, in units of ``loops``."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(len(plan) + 1), context.SimpleQueue()
    ranks = [context.Process(target=_work, args=(barrier, done, units * loops)) for units in plan]
    try:
        for device, rank in enumerate(ranks):
            rank.start()
            assert rank.pid is not None
            devices.join(device, rank.pid)
        barrier.wait(timeout=60)
        start = time.perf_counter()
        return max(done.get() for _ in ranks) - start
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _work(barrier: Barrier, done: "SimpleQueue[float]", loops: int) -> None:
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
    return skewed / balanced


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
