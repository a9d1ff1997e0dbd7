"""Schedules as pictures, closed forms and invariants."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import Schedule
from distrain.planners.schedule_checks import link_orders, verify
from distrain.planners.schedules import Op, PipelineSchedule, Step, build
from distrain.planners.timeline import bubble_fraction, draw, in_flight, simulate

quick = settings(max_examples=50, derandomize=True, deadline=None, database=None)


@st.composite
def schedules(draw_from: st.DrawFn) -> PipelineSchedule:
    kind = draw_from(st.sampled_from(list(Schedule)))
    p = draw_from(st.integers(1, 8))
    v = draw_from(st.integers(1, 4)) if kind is Schedule.INTERLEAVED else 1
    m = draw_from(st.integers(1, 4)) * p if kind is Schedule.INTERLEAVED else draw_from(st.integers(1, 24))
    return build(kind, num_ranks=p, micro_batches=m, stages_per_rank=v)


def picture(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_gpipe_runs_all_forwards_before_all_backwards() -> None:
    timeline = simulate(build(Schedule.GPIPE, num_ranks=3, micro_batches=4))
    assert draw(timeline) == picture("""
        F0 F1 F2 F3 .  .  .  .  .  .  B0 -  B1 -  B2 -  B3 -
        .  F0 F1 F2 F3 .  .  .  B0 -  B1 -  B2 -  B3 -  .  .
        .  .  F0 F1 F2 F3 B0 -  B1 -  B2 -  B3 -  .  .  .  .
    """)


def test_1f1b_alternates_after_a_warm_up_that_shrinks_by_one_a_rank() -> None:
    schedule = build(Schedule.ONE_F_ONE_B, num_ranks=3, micro_batches=5)
    assert draw(schedule) == picture("""
        F0 F1 F2 B0 F3 B1 F4 B2 B3 B4
        F0 F1 B0 F2 B1 F3 B2 F4 B3 B4
        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4
    """)
    assert draw(simulate(schedule)) == picture("""
        F0 F1 F2 .  .  .  .  B0 -  F3 B1 -  F4 B2 -  .  B3 -  .  B4 -
        .  F0 F1 .  .  B0 -  F2 B1 -  F3 B2 -  F4 B3 -  .  B4 -  .  .
        .  .  F0 B0 -  F1 B1 -  F2 B2 -  F3 B3 -  F4 B4 -  .  .  .  .
    """)


def test_interleaved_passes_groups_of_p_micro_batches_through_every_stage_of_a_rank() -> None:
    schedule = build(Schedule.INTERLEAVED, num_ranks=2, micro_batches=4, stages_per_rank=2)
    assert schedule.stage_to_rank == (0, 1, 0, 1)
    assert draw(schedule) == picture("""
        F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3
        F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3
    """)


def test_zbv_never_pauses_once_a_rank_has_begun() -> None:
    timeline = simulate(build(Schedule.ZBV, num_ranks=2, micro_batches=3))
    assert timeline.schedule.stage_to_rank == (0, 1, 1, 0)
    assert draw(timeline) == picture("""
        F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 I0.2 W0.2 .
        .    F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2
    """)


@pytest.mark.parametrize("kind", list(Schedule))
def test_one_rank_accumulates_gradients(kind: Schedule) -> None:
    schedule = build(kind, num_ranks=1, micro_batches=3)
    assert draw(schedule) == "F0 B0 F1 B1 F2 B2"
    assert in_flight(schedule) == (1,)


@quick
@given(schedules())
def test_every_schedule_is_sound_and_its_links_are_fifo(schedule: PipelineSchedule) -> None:
    assert verify(schedule) == []
    sent, taken = link_orders(schedule)
    assert sent == taken
    for stage in range(schedule.num_stages):
        row = schedule.steps[schedule.stage_to_rank[stage]]
        for op in Op:
            order = [step.micro_batch for step in row if step.stage == stage and step.op is op]
            assert order == sorted(order)


@quick
@given(schedules())
def test_a_schedule_survives_json(schedule: PipelineSchedule) -> None:
    assert PipelineSchedule.from_json(schedule.to_json()) == schedule


@quick
@given(p=st.integers(1, 8), m=st.integers(1, 24), v=st.integers(1, 4))
def test_bubbles_follow_their_closed_forms(p: int, m: int, v: int) -> None:
    gpipe = simulate(build(Schedule.GPIPE, num_ranks=p, micro_batches=m))
    flush = simulate(build(Schedule.ONE_F_ONE_B, num_ranks=p, micro_batches=m))
    assert bubble_fraction(gpipe) == pytest.approx((p - 1) / m)
    assert bubble_fraction(flush) == pytest.approx((p - 1) / m)
    interleaved = simulate(build(Schedule.INTERLEAVED, num_ranks=p, micro_batches=m * p, stages_per_rank=v))
    assert bubble_fraction(interleaved) == pytest.approx((p - 1) / (v * m * p))


@quick
@given(p=st.integers(2, 8), more=st.integers(0, 12))
def test_zbv_idles_only_while_the_first_activation_comes_down(p: int, more: int) -> None:
    m = 2 * p - 1 + more
    timeline = simulate(build(Schedule.ZBV, num_ranks=p, micro_batches=m))
    assert [(row[0], timeline.end[rank][-1]) for rank, row in enumerate(timeline.start)] == [
        (rank, 6 * m + rank) for rank in range(p)
    ]
    assert bubble_fraction(timeline) == pytest.approx((p - 1) / (6 * m))


@quick
@given(p=st.integers(1, 8), m=st.integers(1, 24), v=st.integers(2, 4))
def test_in_flight_depths_follow_their_closed_forms(p: int, m: int, v: int) -> None:
    ranks = range(p)
    if p > 1:
        assert in_flight(build(Schedule.GPIPE, num_ranks=p, micro_batches=m)) == (m,) * p
    flush = in_flight(build(Schedule.ONE_F_ONE_B, num_ranks=p, micro_batches=m))
    assert flush == tuple(min(p - rank, m) for rank in ranks)
    interleaved = build(Schedule.INTERLEAVED, num_ranks=p, micro_batches=m * p, stages_per_rank=v)
    assert in_flight(interleaved) == tuple(
        min((v - 1) * p + 2 * (p - rank - 1) + 1, v * m * p) for rank in ranks
    )
    if p > 1:
        zbv = in_flight(build(Schedule.ZBV, num_ranks=p, micro_batches=m))
        assert max(zbv) == min(2 * p, 2 * m)


def test_transfer_time_is_paid_between_ranks_but_not_within_one() -> None:
    flush = simulate(build(Schedule.ONE_F_ONE_B, num_ranks=3, micro_batches=1), p2p=0.5)
    assert flush.makespan == 3 * 3 + 4 * 0.5
    zbv = simulate(build(Schedule.ZBV, num_ranks=3, micro_batches=1), p2p=0.5)
    assert zbv.start[2][:2] == (3.0, 4.0)


def test_a_schedule_that_waits_in_a_circle_is_reported_as_a_deadlock() -> None:
    good = build(Schedule.ONE_F_ONE_B, num_ranks=2, micro_batches=2)
    bad = replace(good, steps=(tuple(map(Step.parse, ["F0.0", "B0.0", "F0.1", "B0.1"])), good.steps[1][::-1]))
    with pytest.raises(ConfigError, match="deadlocks") as caught:
        simulate(bad)
    assert "rank 0 before B0.0" in caught.value.problems[0].got
    assert "rank 1 before B1.1" in caught.value.problems[0].got


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("F0.0 B0.0", "stage 0, micro-batch 1: ran nothing"),
        ("F0.0 F0.0 B0.0 F0.1 B0.1", "stage 0, micro-batch 0: ran B F F"),
        ("F0.0 I0.0 F0.1 B0.1", "stage 0, micro-batch 0: ran F I"),
        ("F0.0 W0.0 I0.0 F0.1 B0.1", "W0.0 on rank 0 comes before I0.0"),
        ("B0.0 F0.0 F0.1 B0.1", "B0.0 on rank 0 comes before F0.0"),
        ("F0.1 B0.1 F0.0 B0.0", "activations from rank 0 to 1: sent as 0.1 0.0, taken as 0.0 0.1"),
        ("F0.0 F0.1 B0.1 B0.0", "gradients from rank 1 to 0: sent as 1.0 1.1, taken as 1.1 1.0"),
        ("F0.0 B0.0 F0.1 B0.1 F1.0", "F1.0 runs on rank 0"),
        ("F0.0 B0.0 F0.1 B0.1 F0.2", "F0.2 on rank 0: no such stage or micro-batch"),
    ],
)
def test_a_broken_schedule_is_described(row: str, complaint: str) -> None:
    good = build(Schedule.ONE_F_ONE_B, num_ranks=2, micro_batches=2)
    bad = replace(good, steps=(tuple(map(Step.parse, row.split())), good.steps[1]))
    assert any(complaint in problem for problem in verify(bad)), verify(bad)


def test_a_schedule_with_missing_rows_or_homeless_stages_is_described() -> None:
    good = build(Schedule.ONE_F_ONE_B, num_ranks=2, micro_batches=2)
    problems = verify(replace(good, steps=good.steps[:1], stage_to_rank=(0, 0)))
    assert len(problems) == 2


def test_impossible_schedules_are_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Schedule.GPIPE, num_ranks=0, micro_batches=0, stages_per_rank=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="multiples of the pipeline ranks"):
        build(Schedule.INTERLEAVED, num_ranks=4, micro_batches=6, stages_per_rank=2)
    for kind, stages in ((Schedule.GPIPE, 2), (Schedule.ONE_F_ONE_B, 2), (Schedule.ZBV, 3)):
        with pytest.raises(ConfigError, match="stages a rank"):
            build(kind, num_ranks=2, micro_batches=2, stages_per_rank=stages)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "spiral"}'])
def test_unreadable_json_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        PipelineSchedule.from_json(text)


def test_a_bad_step_in_json_is_a_config_error() -> None:
    text = build(Schedule.GPIPE, num_ranks=1, micro_batches=1).to_json()
    with pytest.raises(ConfigError, match="cannot be read"):
        PipelineSchedule.from_json(text.replace("F0.0", "Q0.0"))
