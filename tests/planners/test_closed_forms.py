"""Closed forms against the simulation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.vocabulary import Schedule
from distrain.planners.closed_forms import bubble, depth, last_stage_depth
from distrain.planners.schedules import Op, PipelineSchedule, build
from distrain.planners.timeline import in_flight, simulate

quick = settings(max_examples=50, derandomize=True, deadline=None, database=None)


@st.composite
def schedules(draw: st.DrawFn) -> PipelineSchedule:
    kind = draw(st.sampled_from(list(Schedule)))
    p = draw(st.integers(1 if kind in (Schedule.GPIPE, Schedule.ONE_F_ONE_B) else 2, 8))
    v = draw(st.integers(2, 4)) if kind is Schedule.INTERLEAVED else 1
    m = draw(st.integers(1, 3)) * p if kind is Schedule.INTERLEAVED else draw(st.integers(1, 20))
    return build(kind, num_ranks=p, micro_batches=m, stages_per_rank=v)


@quick
@given(schedules(), st.floats(0, 1), st.floats(0, 1))
def test_bubbles_equal_those_of_the_simulation(
    schedule: PipelineSchedule, attention: float, matrices: float
) -> None:
    # An attention layer's costs: I >= F >= W.
    costs = {
        "forward": matrices + attention,
        "backward_input": matrices + 2 * attention,
        "backward_weight": matrices,
    }
    timeline = simulate(schedule, **costs)
    work = schedule.micro_batches * schedule.stages_per_rank * sum(costs.values())
    expected = bubble(
        schedule.kind, num_ranks=schedule.num_ranks, micro_batches=schedule.micro_batches, **costs
    )
    assert timeline.makespan - work == pytest.approx(expected, abs=1e-9)


@quick
@given(schedules())
def test_depths_equal_those_of_the_schedule(schedule: PipelineSchedule) -> None:
    p, v, m = schedule.num_ranks, schedule.stages_per_rank, schedule.micro_batches
    assert depth(schedule.kind, num_ranks=p, stages_per_rank=v, micro_batches=m) == in_flight(schedule)
    last = schedule.num_stages - 1
    live = peak = 0
    for step in schedule.steps[schedule.stage_to_rank[last]]:
        if step.stage == last:
            live += {Op.FORWARD: 1, Op.BACKWARD_INPUT: 0}.get(step.op, -1)
            peak = max(peak, live)
    assert last_stage_depth(schedule.kind, num_ranks=p, micro_batches=m) == peak


@quick
@given(schedules(), st.floats(0, 2))
def test_waiting_for_every_hop_is_never_too_optimistic(schedule: PipelineSchedule, p2p: float) -> None:
    p, v, m = schedule.num_ranks, schedule.stages_per_rank, schedule.micro_batches
    hops = p2p if p > 1 else 0.0
    costs = {"forward": 1 + hops, "backward_input": 1 + hops, "backward_weight": 1.0}
    upper = m * v * sum(costs.values()) + bubble(schedule.kind, num_ranks=p, micro_batches=m, **costs)
    assert simulate(schedule, p2p=p2p).makespan <= upper + 1e-9
