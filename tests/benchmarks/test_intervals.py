"""Intervals of ratios, and when they count as a result."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.intervals import Interval, paired_ratio

TIMES = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12)


@given(TIMES, st.floats(0.5, 2.0))
def test_the_same_ratio_in_every_round_leaves_no_doubt_however_rounds_differ(
    times: list[float], factor: float
) -> None:
    interval = paired_ratio([factor * time for time in times], times)
    assert [interval.median, interval.low, interval.high] == pytest.approx([factor] * 3)


@given(TIMES, st.randoms(use_true_random=False))
def test_the_median_lies_within_its_bounds_and_these_within_the_rounds(
    times: list[float], random: object
) -> None:
    theirs = list(reversed(times))
    interval = paired_ratio(times, theirs)
    ratios = np.array(times) / np.array(theirs)
    assert ratios.min() - 1e-9 <= interval.low <= interval.median <= interval.high <= ratios.max() + 1e-9


def test_one_disturbed_round_of_many_changes_nothing() -> None:
    interval = paired_ratio([1.0] * 10 + [50.0], [1.0] * 11)
    assert (interval.median, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_more_rounds_of_the_same_noise_make_the_interval_narrower() -> None:
    noise = np.random.default_rng(1).normal(1.0, 0.05, size=200)
    few, many = (paired_ratio(noise[:n].tolist(), [1.0] * n) for n in (7, 200))
    assert many.half_width < few.half_width / 2


@pytest.mark.parametrize(
    ("interval", "result"),
    [
        (Interval(1.00, 0.98, 1.02), 1.00),
        (Interval(0.90, 0.89, 0.91), 0.90),  # resolved, and missed
        (Interval(0.98, 0.96, 0.99), math.nan),  # on both sides of the target
        (Interval(1.05, 0.98, 1.10), math.nan),  # too wide to speak of three per cent
        (Interval(1.20, 1.15, 1.26), math.nan),  # too wide, however good
    ],
)
def test_only_a_narrow_interval_on_one_side_of_the_target_is_a_result(
    interval: Interval, result: float
) -> None:
    assert interval.resolved(at_least=0.97, allowed=0.03) == pytest.approx(result, nan_ok=True)
