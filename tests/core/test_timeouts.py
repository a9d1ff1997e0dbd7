"""The ladder of timeouts: every violated pair is named by both fields."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.config import TimeoutConfig
from distrain.core.timeouts import LADDER, MAX_S, check_ladder


def test_the_defaults_are_a_ladder() -> None:
    assert check_ladder(TimeoutConfig()) == []


@pytest.mark.parametrize(("lower", "upper"), list(pairwise(LADDER)))
def test_a_pair_in_the_wrong_order_is_named_by_both_fields_and_the_advice_mends_it(
    lower: str, upper: str
) -> None:
    high = TimeoutConfig(collective_s=1, step_s=2, heartbeat_s=3, barrier_s=4, job_s=5)
    wrong = replace(high, **{upper: getattr(high, lower)})
    problem = check_ladder(wrong)[0]
    assert problem.error == f"timeouts.{upper} must be longer than timeouts.{lower}"
    assert lower in problem.got
    key, _, value = problem.hint.partition("=")
    assert key == f"--set timeouts.{upper}"
    assert float(value) > getattr(high, lower)


def test_every_violated_pair_is_listed() -> None:
    upside_down = TimeoutConfig(collective_s=5, step_s=4, heartbeat_s=3, barrier_s=2, job_s=1)
    assert len(check_ladder(upside_down)) == 4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 2 * MAX_S])
def test_a_rung_out_of_range_is_refused(value: float) -> None:
    errors = [problem.error for problem in check_ladder(TimeoutConfig(job_s=value))]
    assert "timeouts.job_s is out of range" in errors


@given(st.lists(st.floats(1e-3, MAX_S), min_size=5, max_size=5))
def test_exactly_the_increasing_ladders_pass(seconds: list[float]) -> None:
    timeouts = TimeoutConfig(**dict(zip(LADDER, seconds, strict=True)))
    assert (check_ladder(timeouts) == []) == all(lower < upper for lower, upper in pairwise(seconds))
