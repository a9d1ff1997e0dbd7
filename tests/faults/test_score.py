"""The score of a drill: what was done to a job against what it noticed, lost and got back."""

from dataclasses import replace

from distrain.core.vocabulary import FaultKind, IncidentClass
from distrain.faults.inject import FaultPlan, JobShape, Record
from distrain.faults.score import Attempt, Detection, Score, StepDone, score

S = 1_000_000_000
JOB = JobShape(world_size=4, steps=10)
KILL = FaultPlan().kill(ranks=[1]).at(step=5).expect("crash", suspects=[1], within_s=2.0)


def fired(second: float, *, victim: int = 1, fault: int = 0, step: int = 5) -> Record:
    ns = round(second * S)
    kind = FaultKind.PROC_KILL
    return Record(
        fault=fault,
        kind=kind,
        event="fired",
        victim=victim,
        pid=7,
        wall_ns=ns,
        mono_ns=ns,
        host="a",
        step=step,
    )


def launch(began: float, ended: float, steps: dict[int, float], *, code: int = 0) -> Attempt:
    """``steps`` has the second at which each step was done; each took half a second."""
    done = tuple(StepDone(step=n, wall_ns=round(at * S), seconds=0.5) for n, at in steps.items())
    return Attempt(began_ns=round(began * S), ended_ns=round(ended * S), code=code, steps=done)


def noticed(second: float, *suspects: int) -> Detection:
    return Detection(
        incident=IncidentClass.CRASH, suspects=suspects, wall_ns=round(second * S), source="launcher"
    )


FIRST = launch(0, 14, {1: 10, 2: 10.5, 3: 11, 4: 12.1}, code=1)  # a peer reports step 4 late
SECOND = launch(14, 20, {n: 15 + n / 2 for n in range(3, 11)})


def of(plan: FaultPlan, *, truth: list[Record], attempts: list[Attempt], seen: list[Detection]) -> Score:
    return score(plan, JOB, truth=truth, attempts=attempts, detections=seen, is_equal=True)


def test_a_drill_that_went_as_expected_has_times_and_no_problems() -> None:
    found = of(KILL, truth=[fired(12)], attempts=[FIRST, SECOND], seen=[noticed(12.5, 1)])
    assert found.problems == () and found.is_equal
    (row,) = found.faults
    assert (row.detected, row.suspects, row.source, row.step) == (IncidentClass.CRASH, (1,), "launcher", 5)
    assert row.detect_s == 0.5
    assert row.recover_s == 17.5 - 12  # the end of step 5, which had not been done before
    assert found.steps_lost == 2  # 3 and 4 twice
    # From 9.5, where the first step begins, to 20, where the last one ends.
    assert found.goodput == 10 * 0.5 / 10.5
    assert (found.startup_s, found.restarts_s) == (9.5, 2.0)


def test_a_fault_that_did_not_fire_fails_the_drill() -> None:
    found = of(KILL, truth=[], attempts=[SECOND], seen=[])
    assert found.problems == ("fault 0 (proc.sigkill) on 1: it did not fire",)


def test_a_fault_that_the_dice_spare_is_not_missed() -> None:
    found = of(KILL.with_probability(0.0), truth=[], attempts=[SECOND], seen=[])
    assert found.faults == () and found.problems == ()


def test_what_nobody_noticed_or_took_for_something_else_fails_what_was_expected() -> None:
    (silent,) = of(KILL, truth=[fired(12)], attempts=[SECOND], seen=[]).faults
    assert silent.problems == (
        "nobody noticed; expected crash",
        "noticed never; expected within 2 s",
    )
    plan = FaultPlan().kill(ranks=[1]).at(step=5).expect("comm_hang", suspects=[1])
    (wrong,) = of(plan, truth=[fired(12)], attempts=[SECOND], seen=[noticed(13, 2)]).faults
    assert wrong.problems == ("taken for crash; expected comm_hang", "[2] were blamed; expected [1]")


def test_a_detection_before_the_fault_or_after_the_next_one_is_not_its() -> None:
    plan = KILL.kill(ranks=[2]).at(step=8)
    truth = [fired(12), fired(16, victim=2, fault=1, step=8)]
    seen = [noticed(11, 3), noticed(16.25, 2)]
    first, second = of(plan, truth=truth, attempts=[FIRST, SECOND], seen=seen).faults
    assert first.detected is None and second.detect_s == 0.25


def test_a_job_that_never_ends_well_fails_the_drill() -> None:
    found = of(FaultPlan(), truth=[], attempts=[FIRST, FIRST], seen=[])
    assert found.problems == ("the job did not come to its end: exit code 1 after 2 launches",)


def test_what_could_not_be_carried_out_is_said() -> None:
    failure = fired(12)
    records = [failure, replace(failure, event="failed", detail={"reason": "no such process"})]
    (row,) = of(KILL, truth=records, attempts=[SECOND], seen=[noticed(12.5, 1)]).faults
    assert row.problems == ("it could not be carried out: no such process",)


def test_what_a_job_does_after_its_last_step_costs_goodput_only_if_it_fails() -> None:
    """A job that hangs until it is killed has not been training."""
    steps = {n: 10 + n / 2 for n in range(1, 11)}
    sound, hanging = launch(0, 60, steps), launch(0, 60, steps, code=137)
    plan = FaultPlan()
    assert of(plan, truth=[], attempts=[sound], seen=[]).goodput == 1.0
    assert of(plan, truth=[], attempts=[hanging], seen=[]).goodput == 5.0 / 50
    never = of(plan, truth=[], attempts=[launch(0, 60, {}, code=1)], seen=[])
    assert (never.goodput, never.startup_s) == (0.0, 60.0)


def test_a_lost_node_is_noticed_by_whoever_blames_a_rank_of_it() -> None:
    plan = FaultPlan().kill(node=1).at(step=5).expect("crash", suspects=[2, 3])
    job = replace(JOB, num_nodes=2)
    lost = replace(fired(12), kind=FaultKind.NODE_LOSS)
    seen = [noticed(12.5, 0), noticed(13, 3)]
    found = score(plan, job, truth=[lost], attempts=[FIRST, SECOND], detections=seen, is_equal=True)
    assert found.faults[0].suspects == (3,) and found.problems == ()


def test_a_step_that_a_fault_made_slow_counts_for_what_it_usually_takes() -> None:
    """Step 3 of ten takes five seconds longer."""
    steps = [
        StepDone(step=n, wall_ns=S * (n + 5 * (n >= 3)), seconds=6.0 if n == 3 else 1.0) for n in range(1, 11)
    ]
    job = Attempt(began_ns=0, ended_ns=20 * S, code=0, steps=tuple(steps))
    assert of(FaultPlan(), truth=[], attempts=[job], seen=[]).goodput == 10 / 15
    known = score(FaultPlan(), JOB, truth=[], attempts=[job], detections=[], is_equal=None, usual_s=0.5)
    assert known.goodput == 5 / 15


def test_a_dead_rank_is_not_taken_for_its_keeper_that_died_before() -> None:
    plan = FaultPlan().kill(role="keeper").at(step=4).kill(ranks=[1]).at(step=5)
    keeper = replace(fired(11, victim=0), kind=FaultKind.SIDECAR_KILL)
    rank = fired(12, fault=1)
    found = of(plan, truth=[keeper, rank], attempts=[FIRST, SECOND], seen=[noticed(12.5, 1)])
    assert [row.suspects for row in found.faults] == [(), (1,)]
