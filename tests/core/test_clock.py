"""Clocks: the real one never runs backwards, the fake one moves only when told."""

import pytest

from distrain.core.clock import Clock, FakeClock, MonotonicClock


def test_the_machines_clock_never_runs_backwards() -> None:
    clock: Clock = MonotonicClock()
    times = [clock.monotonic_ns() for _ in range(1000)]
    assert times == sorted(times)
    before, wall = clock.monotonic_ns(), clock.wall_s()
    clock.sleep(0.001)
    assert clock.monotonic_ns() - before >= 1_000_000
    assert wall > 1.7e9


def test_a_fake_clock_moves_only_when_told_to() -> None:
    clock = FakeClock()
    assert clock.monotonic_ns() == clock.monotonic_ns() == 0
    clock.advance(1.5)
    clock.sleep(3600)
    assert clock.monotonic_ns() == 3_601_500_000_000
    assert clock.wall_s() == clock.epoch_s + 3601.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)
