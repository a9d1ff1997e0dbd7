"""One job and its failures, second by second: every number here was worked out by hand."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.faults.simulate import (
    Cause,
    FailureClass,
    FailureProcess,
    Failures,
    Job,
    Level,
    Outcome,
    Recovery,
    Shows,
    Survives,
    draw,
    replay,
)
from distrain.faults.simulate.failures import DAY_S

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)

MEMORY = Level(name="memory", survives=Survives.PROCESS, restore_s=1)
PARITY = Level(name="parity", survives=Survives.NODES, restore_s=5, group_nodes=8, max_lost=1)
DISK = Level(name="disk", survives=Survives.ALL, restore_s=50, every=5, delay_s=20)
JOB = Job(
    num_nodes=16,
    num_spares=2,
    horizon_s=10_000,
    interval_s=100,
    stall_s=10,
    levels=(MEMORY, PARITY, DISK),
    recovery=Recovery(
        crash_detect_s=10, hang_detect_s=200, corruption_detect_s=300, diagnose_s=20, restart_s=30
    ),
)
AWAY = 90_000.0


def failures(*rows: tuple[float, int, str] | tuple[float, int, str, float]) -> Failures:
    """Rows of time, node, what it shows as, and repair time; the class has the name of what it shows as."""
    classes = tuple(FailureClass(name=shows, per_1000_node_days=1.0, shows=shows) for shows in Shows)
    return Failures(
        classes,
        np.array([row[0] for row in rows], np.float64),
        np.array([row[1] for row in rows], np.int64),
        np.array([list(Shows).index(Shows(row[2])) for row in rows], np.int64),
        np.array([row[3] if len(row) > 3 else 0.0 for row in rows], np.float64),
    )


def outcome(*rows: tuple[float, int, str] | tuple[float, int, str, float], job: Job = JOB) -> Outcome:
    found = replay(job, failures(*rows))
    assert sum(found.seconds.values()) == pytest.approx(job.horizon_s)
    return found


def lost(found: Outcome) -> dict[str, float]:
    """What was neither training nor saving, without what is 0."""
    kept = {cause: seconds for cause, seconds in found.seconds.items() if seconds}
    return {str(cause): kept[cause] for cause in kept if cause not in (Cause.TRAINING, Cause.STALL)}


def test_without_a_failure_only_saving_costs() -> None:
    found = outcome()
    assert found.saves == 90  # of 110 s each
    assert found.seconds[Cause.STALL] == 900
    assert found.seconds[Cause.TRAINING] == 9_100
    assert found.ettr == 0.91
    assert (found.interruptions, found.failures, lost(found)) == (0, {}, {})


def test_a_dead_process_loses_what_came_after_the_last_save_and_restores_from_memory() -> None:
    found = outcome((1000, 3, "crash"))
    assert lost(found) == {"lost_work": 10, "detect": 10, "diagnose": 20, "restart": 30, "restore": 1}
    assert (
        found.seconds[Cause.TRAINING] == 900 + 8129
    )  # nine saves until 1000; 81 more from 1061 on, and 29 s
    assert found.saves == 9 + 81
    assert found.seconds_by_class["crash"][Cause.LOST_WORK] == 10
    assert (found.interruptions, found.failures) == (1, {"crash": 1})


def test_a_failure_within_a_stall_loses_the_save_that_it_interrupts() -> None:
    assert lost(outcome((105, 0, "crash")))["lost_work"] == 100
    assert lost(outcome((111, 0, "crash")))["lost_work"] == 1


def test_a_lost_node_restores_from_parity_and_two_of_one_group_from_disk() -> None:
    one = outcome((1000, 3, "crash", AWAY))
    assert (lost(one)["lost_work"], lost(one)["restore"]) == (10, 5)
    apart = outcome((1000, 3, "crash", AWAY), (1000, 8, "crash", AWAY))
    assert (lost(apart)["lost_work"], lost(apart)["restore"]) == (10, 5)
    together = outcome((1000, 3, "crash", AWAY), (1000, 4, "crash", AWAY))
    assert (lost(together)["lost_work"], lost(together)["restore"]) == (410, 50)  # the fifth save: 500
    assert (together.interruptions, together.failures) == (1, {"crash": 2})


def test_as_many_combinations_of_lost_nodes_are_survived_as_geminis_formula_says() -> None:
    """Of f lost nodes in N, groups of g with one parity survive C(N/g, f) g^f / C(N, f)."""
    level = replace(PARITY, group_nodes=4)
    for num_lost in (1, 2, 3, 4):
        cases = list(combinations(range(16), num_lost))
        survived = sum(level.outlives(case) for case in cases)
        assert survived == comb(4, num_lost) * 4**num_lost
        assert len(cases) == comb(16, num_lost)


def test_parity_that_survives_two_does() -> None:
    job = replace(JOB, levels=(replace(PARITY, max_lost=2), DISK))
    found = outcome((1000, 3, "crash", AWAY), (1000, 4, "crash", AWAY), job=job)
    assert (lost(found)["lost_work"], lost(found)["restore"]) == (10, 5)


def test_a_failure_in_a_recovery_begins_it_anew_with_what_is_left_by_then() -> None:
    found = outcome((1000, 3, "crash", AWAY), (1040, 4, "crash", AWAY))
    assert lost(found) == {
        "lost_work": 410,
        "detect": 20,
        "diagnose": 40,
        "restart": 10 + 30,
        "restore": 50,
    }
    assert (found.interruptions, found.failures) == (1, {"crash": 2})


def test_a_group_is_whole_again_once_training_goes_on() -> None:
    found = outcome((1000, 3, "crash", AWAY), (2000, 4, "crash", AWAY))
    assert lost(found)["lost_work"] == 10 + 55
    assert lost(found)["restore"] == 5 + 5


def test_memory_holds_what_was_restored_from_disk() -> None:
    rows = (1000.0, 3, "crash", AWAY), (1000.0, 4, "crash", AWAY)
    found = outcome(*rows, (1150, 5, "crash"))  # 40 s after training went on, before the next save
    assert lost(found)["lost_work"] == 410 + 40
    assert lost(found)["restore"] == 50 + 1


def test_a_level_that_takes_each_fifth_save_counts_on_through_restarts() -> None:
    """Nine saves before the stop, so the first one after it is the tenth, on disk from 1171 on."""
    found = outcome((1000, 3, "planned"), (1200, 3, "crash", AWAY), (1200, 4, "crash", AWAY))
    assert lost(found)["lost_work"] == 49


def test_a_save_counts_at_a_level_only_after_its_delay() -> None:
    job = replace(JOB, levels=(replace(DISK, every=1),))
    assert lost(outcome((1005, 0, "crash"), job=job))["lost_work"] == 900 + 15 - 800
    assert lost(outcome((1011, 0, "crash"), job=job))["lost_work"] == 900 + 21 - 900


def test_nothing_saved_is_a_new_beginning() -> None:
    found = outcome((90, 0, "crash"))
    assert lost(found)["lost_work"] == 90
    assert found.spans[-1].start_s == 90 + 61


def test_a_hang_takes_longer_to_notice() -> None:
    assert lost(outcome((1000, 3, "hang")))["detect"] == 200


def test_a_planned_stop_saves_first_and_loses_nothing() -> None:
    found = outcome((1000, 3, "planned"))
    assert lost(found) == {"restart": 30, "restore": 1}
    assert found.seconds[Cause.STALL] == 90 + 10 + 810
    assert found.seconds[Cause.TRAINING] == 910 + 8149


def test_a_planned_stop_of_a_job_that_is_down_changes_nothing() -> None:
    assert outcome((1000, 3, "crash"), (1020, 4, "planned")) == outcome((1000, 3, "crash"))


def test_a_corruption_goes_back_before_its_onset_when_it_is_found() -> None:
    found = outcome((1000, 3, "corruption"))
    assert lost(found) == {"lost_work": 1190 - 500, "diagnose": 20, "restart": 30, "restore": 50}
    assert found.spans[0].end_s == 1300


def test_a_corruption_survives_a_restart_from_a_save_after_its_onset() -> None:
    found = outcome((1000, 3, "corruption"), (1150, 5, "crash"))
    assert found.failures == {"crash": 1, "corruption": 1}
    assert found.seconds_by_class["corruption"][Cause.LOST_WORK] == 1000 + 89 - 500


def test_a_corruption_is_gone_once_the_job_went_back_before_it() -> None:
    rows = (1100.0, 3, "crash", AWAY), (1100.0, 4, "crash", AWAY)
    assert outcome((1000, 7, "corruption"), *rows) == outcome(*rows)


def test_a_corruption_of_a_job_that_is_down_changes_nothing() -> None:
    assert outcome((1000, 3, "crash"), (1030, 4, "corruption")) == outcome((1000, 3, "crash"))


def test_without_a_spare_the_job_waits_for_the_repair() -> None:
    found = outcome((1000, 3, "crash", 600), job=replace(JOB, num_spares=0))
    assert lost(found)["wait"] == 570  # from 1030 to 1600
    assert found.seconds_by_class["crash"][Cause.WAIT] == 570


def test_spares_run_out() -> None:
    rows = [(1000.0 * number, number, "crash", AWAY) for number in (1, 2, 3)]
    assert "wait" not in lost(outcome(*rows[:2]))
    assert lost(outcome(*rows))["wait"] == 10_000 - 3030


def test_a_repaired_node_is_a_spare() -> None:
    job = replace(JOB, num_spares=1)
    rows = (1000.0, 1, "crash", 500.0), (2000.0, 2, "crash", AWAY)
    assert "wait" not in lost(outcome(*rows, job=job))
    assert outcome(*rows, (3000, 1, "crash"), job=job).failures == {"crash": 3}
    assert outcome(*rows, (3000, 2, "crash"), job=job).failures == {"crash": 2}


def test_what_happens_to_a_spare_is_felt_only_when_it_is_needed() -> None:
    job = replace(JOB, num_spares=1)
    assert outcome((500, 16, "crash"), (600, 16, "crash", 2000), job=job) == outcome(job=job)
    found = outcome((600, 16, "crash", 2000), (1000, 3, "crash", AWAY), job=job)
    assert lost(found)["wait"] == 2600 - 1030


def test_a_node_in_repair_cannot_fail() -> None:
    job = replace(JOB, num_spares=1)
    rows = (1000.0, 3, "crash", 600.0), (1200.0, 3, "crash", 5000.0), (2000.0, 4, "crash", AWAY)
    assert outcome(*rows, job=job) == outcome(rows[0], rows[2], job=job)
    assert "wait" not in lost(outcome(*rows, job=job))


def test_a_node_that_the_job_waits_for_cannot_fail() -> None:
    job = replace(JOB, num_spares=0)
    rows = (1000.0, 3, "crash", 600.0), (1200.0, 3, "crash")
    assert outcome(*rows, job=job) == outcome(rows[0], job=job)


def test_a_spare_takes_the_place_of_the_node_in_its_parity_group() -> None:
    """Node 16 stands for 9 in the second group, so its loss together with that of 10 is too much."""
    rows = (1000.0, 9, "crash", AWAY), (3000.0, 16, "crash", AWAY), (3000.0, 10, "crash", AWAY)
    job = replace(JOB, num_spares=4)
    assert lost(outcome(*rows, job=job))["restore"] == 5 + 50


def test_what_happens_after_the_end_does_not_count() -> None:
    assert outcome((10_000, 3, "crash"), (9_900, 3, "corruption")) == outcome()
    cut = outcome((9_990, 3, "crash"))
    assert lost(cut)["detect"] == 10
    assert "diagnose" not in lost(cut)


@quick
@given(
    seed=st.integers(0, 10_000),
    per_1000=st.sampled_from([100.0, 3000.0, 60_000.0]),
    correlated=st.sampled_from([0.0, 0.5]),
    num_spares=st.integers(0, 3),
    every=st.integers(1, 7),
    interval_s=st.floats(1, 5000),
    stall_s=st.floats(0, 100),
)
def test_every_second_has_one_cause_and_spans_follow_on_each_other(
    seed: int,
    per_1000: float,
    correlated: float,
    num_spares: int,
    every: int,
    interval_s: float,
    stall_s: float,
) -> None:
    classes = tuple(
        FailureClass(name=shows, per_1000_node_days=per_1000, node_share=0.5, shows=shows) for shows in Shows
    )
    process = FailureProcess(classes=classes, correlated=correlated, repair_median_s=3600.0)
    drawn = draw(process, num_nodes=16 + num_spares, horizon_s=3 * DAY_S, seed=seed)
    job = replace(
        JOB,
        horizon_s=3 * DAY_S,
        num_spares=num_spares,
        interval_s=interval_s,
        stall_s=stall_s,
        levels=(MEMORY, PARITY, replace(DISK, every=every)),
    )
    found = replay(job, drawn)
    assert sum(found.seconds.values()) == pytest.approx(job.horizon_s)
    assert all(seconds >= -1e-6 for seconds in found.seconds.values())
    assert 0 <= found.ettr <= interval_s / (interval_s + stall_s) + interval_s / job.horizon_s
    assert found.interruptions <= sum(found.failures.values()) <= len(drawn)
    assert found.spans[0].start_s == 0
    assert found.spans[-1].end_s == pytest.approx(job.horizon_s)
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        assert before.start_s < before.end_s == after.start_s
