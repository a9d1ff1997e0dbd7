"""Fixed speed without any rights: a thread stops processes by signal when they have used their CPU time.

Sleeps of calibrated length during compute, in other words, but put in from outside, so that any program can be slowed
down. Coarser than the kernel: a device may overdraw by the time between two looks, and then pays it back.
"""

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass

LOOKS_A_PERIOD = 4


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


class Signals:
    """One budget of CPU time a device; a ``FixedSpeed``."""

    def __init__(self, num_devices: int, *, quota: float, period_s: float) -> None:
        self.kind = "stopped by signals"
        self.quota = quota
        self._period_s = period_s
        self._devices = [_Paced([]) for _ in range(num_devices)]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pace, name="distrain-fixed-speed", daemon=True)

    def __enter__(self) -> "Signals":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        for device in self._devices:
            for process in device.processes:
                process.release()

    def join(self, device: int, pid: int) -> None:
        """Put the process ``pid`` on ``device``."""
        with self._lock:
            self._devices[device].processes.append(_Process(pid))

    def _pace(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._period_s / LOOKS_A_PERIOD):
            now = time.monotonic()
            earned, before = (now - before) * self.quota, now
            with self._lock:
                for device in self._devices:
                    device.settle(earned, self._period_s * self.quota)
