"""The benchmark of sequence groups: who trains something else is not compared, and peers plan as well as we do."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.crew import crew
from benchmarks.harness import Row, Session
from benchmarks.sequence_contenders import Job, Reference, Worker
from benchmarks.sequence_parallel import CHECKED_STEPS, Contender, Setting, measure, report
from benchmarks.sequence_plans import adaptive_plan, long_tailed, samples, static_plans, uniform
from distrain.core.vocabulary import ModelShape
from distrain.planners.sequence.cost import SequenceCost
from distrain.planners.sequence.step_plan import StepPlan

TINY = ModelShape(d_model=32, num_layers=1, num_heads=4, num_kv_heads=2, d_ffn=64, vocab_size=64)
JOB = Job(shape=TINY, lengths=(30, 5, 9, 60, 17))
COST = SequenceCost(
    alpha1=1e-3,
    alpha2=0.1,
    beta1=1.0,
    layers=1,
    hidden=32,
    tokens_per_gpu=32,
    bandwidth_gb_s={2: 0.1, 4: 0.05},
)


def session(*, quick: bool) -> Session:
    return Session("test", quick, 1, None, Console(file=io.StringIO()))


@pytest.mark.ranks
def test_every_plan_is_timed_and_trains_as_one_process_does() -> None:
    rows = measure(Setting("tiny", JOB, 2, 64, repeats=1), session(quick=True))
    contenders = {row["contender"]: row for row in rows if "contender" in row}
    assert contenders.keys() == {"adaptive", "degree 1", "degree 2"}
    for row in contenders.values():
        assert not row["problem"] and 0 < row["difference"] <= 1e-5
        assert row["tokens_per_s"] > 0
    assert {row["plan"] for row in rows if "met_ms" in row} == contenders.keys()


@pytest.mark.ranks
def test_a_plan_that_leaves_a_sequence_out_is_found_out() -> None:
    plan = adaptive_plan(JOB.lengths, num_slots=2, cost=COST)
    with (
        crew("reference", Reference, JOB, world_size=1) as alone,
        crew("ours", Worker, JOB, world_size=2) as ours,
    ):
        alone.ready()
        ours.ready()
        ((losses, weights),) = alone.call("checked", CHECKED_STEPS)
        whole, short = (Contender("adaptive", ours, each, JOB) for each in (plan, _without_one(plan)))
        for each in (whole, short):
            each.check(losses, weights)
            each.turn()
    assert not whole.row["problem"] and whole.row["times_ms"]
    assert "differ" in short.row["problem"] and not short.row["times_ms"]


def _without_one(plan: StepPlan) -> StepPlan:
    first, *others = plan.microbatches[0]
    fewer = replace(first, sequences=first.sequences[1:])
    return replace(plan, microbatches=((fewer, *others), *plan.microbatches[1:]))


def test_static_plans_have_one_degree_and_every_sequence() -> None:
    lengths = long_tailed(40, longest=60)
    plans = static_plans(lengths, num_slots=4, cost=COST)
    assert plans.keys() == {2, 4}, "60 tokens do not fit one device of 32"
    for degree, plan in plans.items():
        assert not plan.check(lengths)
        assert {group.degree for groups in plan.microbatches for group in groups} == {degree}
    best = min(plan.estimated_ms for plan in plans.values())
    assert adaptive_plan(lengths, num_slots=4, cost=COST).estimated_ms <= best


def test_groups_that_are_timed_fit_their_memory_and_fill_the_devices() -> None:
    for degree in (1, 2, 4):
        for lengths in samples(degree, tokens_per_gpu=500):
            assert 0 < sum(lengths) <= 500 * degree
            plan = uniform(lengths, degree, num_slots=4)
            assert not plan.check(lengths * (4 // degree))


def row(name: str, *times_ms: float, problem: str = "") -> Row:
    return {
        "contender": name,
        "times_ms": list(times_ms),
        "step_ms": sorted(times_ms)[len(times_ms) // 2] if times_ms else math.nan,
        "problem": problem,
    }


def test_the_metric_is_that_over_the_best_degree_and_errors_count_without_sign() -> None:
    done = session(quick=False)
    rows = [row("adaptive", 2.0, 2.0), row("degree 4", 3.0, 3.0), row("degree 8", 5.0, 5.0)]
    report([*rows, {"error": 0.1}, {"error": -0.3}], done)
    assert done.metrics["adaptive_over_best_static"] == 1.5
    assert done.metrics["prediction_error"] == pytest.approx(0.2)


def test_a_peer_that_fails_gives_nan_and_ours_fails_the_run() -> None:
    peer = row("DeepSpeed-Ulysses, degree 4", problem="died")
    done = session(quick=False)
    report([row("adaptive", 2.0), row("degree 4", 3.0), peer, {"error": 0.1}], done)
    assert math.isnan(done.metrics["ours_over_deepspeed_ulysses"]) and not done.failed
    report([row("adaptive", problem="died"), row("degree 4", 3.0)], done)
    assert done.failed == ["adaptive: died"]
