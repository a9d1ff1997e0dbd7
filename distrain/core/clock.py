"""Time, as something that is passed in: deadlines, heartbeats and events are tested without waiting.

Two times are needed. Monotonic nanoseconds order and measure what happens within one host; wall seconds line
up hosts, and jump when somebody sets the clock. Nothing may compute a duration from wall time.
"""

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary start; never runs backwards."""

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC."""

    def sleep(self, seconds: float) -> None:
        """Return after ``seconds``."""


class MonotonicClock:
    """The clock of this machine."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot, the same in every process of this host."""
        return time.monotonic_ns()

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC, as this host believes."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Really wait."""
        time.sleep(seconds)


@dataclass(slots=True)
class FakeClock:
    """A clock that moves only when told to; sleeping on it moves it."""

    now_ns: int = 0
    epoch_s: float = 1.7e9
    """wall time at monotonic zero"""

    def monotonic_ns(self) -> int:
        """Nanoseconds that were advanced so far."""
        return self.now_ns

    def wall_s(self) -> float:
        """Wall time that keeps in step with the monotonic one."""
        return self.epoch_s + self.now_ns / 1e9

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass; raises ValueError for a step backwards."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds}")
        self.now_ns += round(seconds * 1e9)

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass at once."""
        self.advance(seconds)
