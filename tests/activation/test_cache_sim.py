"""The simulated caching allocator follows torch's rules, and shows what a plan saves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.activation.cache_sim import MIB, CacheRun, simulate
from distrain.core.errors import ConfigError
from distrain.planners.buffers import solve
from helpers.buffers import any_buffers, buffers


def run(*rows: tuple[int, int, int], num_steps: int = 1, capacity: int | None = None) -> CacheRun:
    return simulate(buffers(*rows), num_steps=num_steps, capacity=capacity)


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # a rest of 1 MiB is not worth a block
        (13 * MIB - 512, 13 * MIB - 512, 14 * MIB),
    ],
)
def test_sizes_are_rounded_and_segments_have_their_sizes(size: int, allocated: int, reserved: int) -> None:
    ran = run((0, 1, size))
    assert (ran.allocated_bytes, ran.reserved_bytes, ran.live_bytes) == (allocated, reserved, size)


def test_small_requests_share_a_segment_and_large_ones_another() -> None:
    ran = run(*[(0, 1, MIB // 4)] * 8, *[(0, 1, 5 * MIB)] * 4)
    assert (ran.num_segments, ran.reserved_bytes) == (2, 22 * MIB)
    assert run(*[(0, 1, MIB // 4)] * 9).num_segments == 2


def test_the_smallest_block_that_is_large_enough_serves() -> None:
    # Holes of 30 and 12 MiB; the request of 12 must leave the 30 to the last.
    ran = run((0, 1, 30 * MIB), (0, 1, 12 * MIB), (2, 4, 12 * MIB), (3, 4, 30 * MIB))
    assert (ran.num_segments, ran.reserved_bytes) == (2, 42 * MIB)


def test_freed_neighbours_join_on_both_sides() -> None:
    thirds = [(0, 4, 6 * MIB), (0, 2, 6 * MIB), (0, 3, 6 * MIB)]  # of one segment of 20 MiB
    assert run(*thirds, (5, 6, 20 * MIB - 512)).num_segments == 1
    assert run(*thirds, (3, 6, 12 * MIB)).num_segments == 1  # the second and third, while the first lives
    assert run((0, 3, 6 * MIB), (0, 9, 6 * MIB), (0, 3, 6 * MIB), (4, 6, 12 * MIB)).num_segments == 2


def test_what_is_freed_serves_the_next_step() -> None:
    rows = [(0, 2, 30 * MIB), (1, 3, 50 * MIB), (2, 4, 30 * MIB)]
    assert run(*rows) == run(*rows, num_steps=5)


def test_a_growing_sequence_fragments_the_cache_and_not_the_plan() -> None:
    rows = [(time, time + 2, (20 + 4 * time) * MIB) for time in range(8)]  # no block fits where another was
    ran = run(*rows)
    planned = solve(buffers(*rows)).peak
    assert planned == ran.live_bytes == (44 + 48) * MIB
    assert ran.reserved_bytes > 2.5 * planned
    assert ran.fragmentation == 1 - ran.live_bytes / ran.reserved_bytes > 0.6


def test_a_full_device_gets_back_what_is_unused_before_it_refuses() -> None:
    rows = [(0, 1, 30 * MIB), (1, 2, 40 * MIB)]
    assert run(*rows, capacity=70 * MIB).num_retries == 0
    tight = run(*rows, capacity=40 * MIB)
    assert (tight.num_retries, tight.refused, tight.reserved_bytes) == (1, None, 40 * MIB)
    full = run((0, 2, 30 * MIB), (1, 2, 40 * MIB), capacity=69 * MIB)
    assert (full.num_retries, full.refused) == (1, "b1")


def test_a_segment_in_which_somebody_lives_stays() -> None:
    rows = [(0, 3, 2 * MIB), (0, 1, 12 * MIB), (1, 3, 30 * MIB)]
    assert run(*rows, capacity=32 * MIB).refused == "b2"


def test_buffers_that_are_wrong_are_refused() -> None:
    with pytest.raises(ConfigError, match="negative size"):
        run((0, 1, -5))


@given(any_buffers(most=40, most_time=30), st.sampled_from([1, 700, 300_000, 3 * MIB]))
def test_it_never_holds_less_than_lives(given: tuple[object, ...], unit: int) -> None:
    scaled = buffers(*[(each.lower, each.upper, each.size * unit) for each in given])  # type: ignore[attr-defined]
    ran = simulate(scaled, num_steps=2)
    assert ran.live_bytes <= ran.allocated_bytes <= ran.reserved_bytes
    assert solve(scaled, time_limit_s=1).lower_bound == ran.live_bytes
    assert simulate(scaled, num_steps=2, capacity=ran.reserved_bytes) == ran
