"""Plans of buffers: valid, as good as they are said to be, and honest where they are not."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from distrain.core.errors import ConfigError
from distrain.planners.buffers import Buffer, Status, engine, milp, solve, solve_by_layers, violations
from distrain.planners.buffers.bounds import sections
from distrain.planners.buffers.engine import PYTHON
from distrain.planners.buffers.problem import aligned
from helpers.buffers import PINWHEEL, TOO_TALL, any_buffers, buffers, lowest_peak

few = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@given(any_buffers(most=6))
@few
def test_the_lowest_peak_is_found_and_proven(given_buffers: tuple[Buffer, ...]) -> None:
    plan = solve(given_buffers)
    assert plan.status is Status.OPTIMAL
    assert plan.peak == plan.lower_bound == lowest_peak(given_buffers)
    assert plan.gap == 0
    assert not violations(given_buffers, plan.offsets, peak=plan.peak)


def test_a_bound_that_cannot_be_reached_is_raised_by_a_proof() -> None:
    plan = solve(TOO_TALL)
    assert (plan.peak, plan.lower_bound, plan.status) == (7, 7, Status.OPTIMAL)
    assert "nothing fits under 6" in plan.proof
    assert solve(TOO_TALL, engine=PYTHON).peak == 7


def test_a_capacity_is_met_refused_or_left_open() -> None:
    assert solve(TOO_TALL, capacity=9).status in (Status.FEASIBLE, Status.OPTIMAL)
    below_the_load = solve(TOO_TALL, capacity=5)
    assert (below_the_load.status, below_the_load.lower_bound) == (Status.INFEASIBLE, 6)
    assert "max-live section [1, 3) holds 6" in below_the_load.proof
    exhausted = solve(TOO_TALL, capacity=6)
    assert (exhausted.status, exhausted.peak, exhausted.gap) == (Status.INFEASIBLE, None, None)
    assert "exhausted" in exhausted.proof
    assert exhausted.lower_bound == 7
    assert solve(TOO_TALL, capacity=6, time_limit_s=0, engine=PYTHON).status in (
        Status.INFEASIBLE,
        Status.UNDECIDED,
    )


def test_parts_that_are_apart_in_time_are_planned_apart() -> None:
    later = tuple(
        replace(each, id=f"later {each.id}", lower=each.lower + 50, upper=each.upper + 50)
        for each in PINWHEEL
    )
    plan = solve((*PINWHEEL, *later, Buffer("between", 20, 30, 4)))
    assert (plan.peak, plan.status) == (5, Status.OPTIMAL)


def test_nothing_and_empty_buffers_need_nothing() -> None:
    assert (solve(()).peak, solve(()).status) == (0, Status.OPTIMAL)
    plan = solve(buffers((0, 5, 0), (0, 5, 3), (1, 2, 0)))
    assert (plan.peak, plan.offsets[1]) == (3, 0)
    assert solve(buffers((0, 1, 0)), capacity=0).status is Status.OPTIMAL


def test_alignment_rounds_sizes_so_that_offsets_are_multiples() -> None:
    given_buffers = buffers((0, 3, 700), (1, 4, 5), (2, 6, 513))
    plan = solve(aligned(given_buffers, alignment=512))
    assert all(offset % 512 == 0 for offset in plan.offsets)
    ends = [offset + each.size for offset, each in zip(plan.offsets, given_buffers, strict=True)]
    assert not violations(given_buffers, plan.offsets, peak=max(ends))


def test_mistakes_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        solve([Buffer("a", 3, 3, 1), Buffer("a", 0, 1, -1)])
    assert len(caught.value.problems) == 3


def test_without_native_code_the_plan_says_so() -> None:
    plan = solve(PINWHEEL, engine=PYTHON)
    assert plan.peak == 5
    assert plan.notes == ("no native search: native code was not asked for",)
    assert not solve(PINWHEEL, engine=engine.engine(build=True)).notes


@given(any_buffers(most=7))
@few
def test_the_program_proves_the_lowest_peak(given_buffers: tuple[Buffer, ...]) -> None:
    cut = sections(given_buffers)
    found = milp.minimise(cut, upper_bound=int(cut.size.sum()), lower_bound=cut.max_live, time_limit_s=30)
    assert found.peak == found.lower_bound == lowest_peak(given_buffers)
    assert not violations(given_buffers, found.offsets, peak=found.peak)


def test_a_neighbourhood_keeps_the_order_of_all_others() -> None:
    # x lies on a for no reason: freeing both is enough to bring it down.
    given_buffers = buffers((0, 4, 2), (0, 4, 3), (4, 8, 2), (0, 8, 1))
    cut, start = sections(given_buffers), [0, 2, 6, 8]
    found = milp.minimise(cut, upper_bound=9, lower_bound=6, time_limit_s=30, start=start, free={2, 3})
    assert found.peak == 6
    assert found.lower_bound == 6
    assert found.offsets[0] < found.offsets[1] < found.offsets[3]


def test_layers_that_look_alike_are_planned_once_and_share_addresses() -> None:
    layer = [(0, 2, 4), (1, 3, 2), (2, 4, 4)]
    rows = [(a + start, b + start, size) for start in (0, 4, 8) for a, b, size in layer]
    levels = solve_by_layers(buffers(*rows, (0, 12, 3)), [(0, 4), (4, 8), (8, 12)])
    assert len(levels.passes) == 1
    assert levels.plan.offsets[0:3] == levels.plan.offsets[3:6] == levels.plan.offsets[6:9]
    assert (levels.plan.peak, levels.loss) == (9, 0)


def test_two_levels_lose_what_a_pass_leaves_unused() -> None:
    # While the pass holds 2 bytes of its 6, a buffer of 4 comes and goes: flat it fits beneath the peak.
    given_buffers = buffers((0, 2, 6), (2, 4, 2), (2, 6, 4))
    levels = solve_by_layers(given_buffers, [(0, 4)])
    assert solve(given_buffers).peak == 6
    assert levels.plan.peak == 10
    assert levels.loss == pytest.approx(4 / 6)
    assert levels.plan.status is Status.FEASIBLE


def test_passes_that_overlap_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        solve_by_layers(PINWHEEL, [(0, 3), (2, 4), (5, 5)])
    assert [problem.error for problem in caught.value.problems] == [
        "pass 2 takes no time",
        "pass 1 begins before pass 0 has ended",
    ]


@pytest.mark.parametrize(
    ("offsets", "peak", "capacity", "expected"),
    [
        ([0, 0, 3, 2, 2], 5, 5, None),
        ([0, 0, 3, 2], 5, None, "5 buffers have 4 offsets"),
        ([0, 0, 3, 2, -1], 5, None, "b4 lies at the negative offset -1"),
        ([0, 0, 3, 2, 2], 4, None, "the highest byte is 5, not 4"),
        ([0, 0, 3, 2, 2], 5, 4, "beyond the capacity 4"),
        ([0, 0, 3, 2, 1], 5, None, "b0 and b4 share bytes at time 2"),
        ([0, 0, 3, 1, 2], 5, None, "b0 and b3 share bytes at time 0"),
    ],
)
def test_the_check_finds_what_is_wrong(
    offsets: list[int], peak: int, capacity: int | None, expected: str | None
) -> None:
    found = violations(PINWHEEL, offsets, peak=peak, capacity=capacity)
    assert not found if expected is None else any(expected in each for each in found)
