"""The simulation where mathematics knows the answer: within 1 %, and seconds for a month of 16,384 GPUs."""

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.exact import job, one_failure, poisson
from distrain.checkpoint.interval import optimal_interval_s
from distrain.faults.simulate import Scenario, load_scenario, replay, run_seeds, search
from distrain.faults.simulate.closed_forms import (
    best_interval_s,
    ettr,
    ettr_with_one_failure,
    ettr_without_failure,
)
from distrain.faults.simulate.failures import DAY_S
from distrain.faults.simulate.sweep import estimate


@pytest.mark.parametrize(("interval_s", "stall_s"), [(60, 0), (600, 5), (1800, 120), (7200, 900)])
def test_without_failures(interval_s: float, stall_s: float) -> None:
    found = replay(
        job(interval_s=interval_s, stall_s=stall_s, recovery_s=0, horizon_s=365 * DAY_S),
        poisson(math.inf, horizon_s=365 * DAY_S, seed=0),
    )
    expected = ettr_without_failure(interval_s=interval_s, stall_s=stall_s)
    assert found.ettr == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("failure_s", [0.0, 599.0, 603.0, 40_000.0, 86_399.0])
def test_with_one_failure(failure_s: float) -> None:
    policy = {"interval_s": 600.0, "stall_s": 5.0, "recovery_s": 400.0, "horizon_s": DAY_S}
    expected = ettr_with_one_failure(failure_s=failure_s, **policy)
    assert replay(job(**policy), one_failure(failure_s)).ettr == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("mtbf_s", "interval_s", "stall_s", "recovery_s"),
    [
        (10_000, 500, 10, 300),
        (10_000, 2000, 60, 900),
        (3600, 300, 20, 1200),  # recoveries are often interrupted
        (100_000, 3600, 120, 1800),
    ],
)
def test_exponential_failures_give_dalys_expectation(
    mtbf_s: float, interval_s: float, stall_s: float, recovery_s: float
) -> None:
    horizon_s = 3000 * mtbf_s
    policy = job(interval_s=interval_s, stall_s=stall_s, recovery_s=recovery_s, horizon_s=horizon_s)
    found = [replay(policy, poisson(mtbf_s, horizon_s=horizon_s, seed=seed)).ettr for seed in range(5)]
    expected = ettr(interval_s=interval_s, stall_s=stall_s, mtbf_s=mtbf_s, recovery_s=recovery_s)
    assert statistics.fmean(found) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("stall_s", "mtbf_s"), [(1, 100_000), (30, 10_000), (600, 3600), (5000, 1000)])
def test_the_best_interval_is_the_top_of_the_expectation(stall_s: float, mtbf_s: float) -> None:
    best_s = best_interval_s(stall_s=stall_s, mtbf_s=mtbf_s)
    top, *others = (
        ettr(interval_s=best_s * factor, stall_s=stall_s, mtbf_s=mtbf_s, recovery_s=10)
        for factor in (1, 0.999, 1.001, 0.7, 1.4)
    )
    assert all(top > other for other in others)


def test_the_best_interval_agrees_with_the_one_that_the_checkpointer_uses() -> None:
    for stall_s in (0.1, 1, 10, 100):
        best_s = best_interval_s(stall_s=stall_s, mtbf_s=10_000)
        assert best_s == pytest.approx(optimal_interval_s(stall_s=stall_s, mtbf_s=10_000), rel=0.01)
        assert best_s == pytest.approx(math.sqrt(2 * stall_s * 10_000), rel=0.1)
    assert best_interval_s(stall_s=0, mtbf_s=10_000) == 0


SIMPLE: dict[str, Any] = {
    "job.gpus": 8192,
    "job.spare_nodes": 0,
    "job.days": 90.0,
    "failures.classes": [{"name": "crash", "per_1000_node_days": 10.0}],
    "checkpoint.stall_s": 30.0,
}


def test_the_interval_that_is_searched_is_that_of_the_closed_form() -> None:
    scenario = load_scenario(overrides=SIMPLE)
    mtbf_s = DAY_S / 1024 * 100
    assert scenario.mtbf_s(scenario.failures_of(0)) == pytest.approx(mtbf_s)
    formula_s = best_interval_s(stall_s=30, mtbf_s=mtbf_s)
    assert scenario.interval_s(scenario.failures_of(0)) == pytest.approx(formula_s)
    curve = search(scenario, range(4))
    best_s, best = curve.best
    recovery_s = 32 + 473 + 97 + 32.768
    expected = ettr(interval_s=formula_s, stall_s=30, mtbf_s=mtbf_s, recovery_s=recovery_s)
    assert best.mean == pytest.approx(expected, rel=0.01)
    assert formula_s / 1.6 < best_s < formula_s * 1.6
    ends = curve.points[0][1].mean, curve.points[-1][1].mean
    assert max(ends) < best.mean - 0.02
    assert [at_s for at_s, _ in curve.points] == sorted({at_s for at_s, _ in curve.points})


def test_auto_follows_the_levels_where_these_are_slower() -> None:
    slow = {"name": "disk", "survives": "all", "restore_s": 1, "delay_s": 9000, "every": 2}
    scenario = load_scenario(overrides={**SIMPLE, "checkpoint.levels": [slow]})
    assert scenario.interval_s(scenario.failures_of(0)) == 4500
    assert search(scenario, range(1)).points[0][0] >= 4500


def test_levels_in_memory_pay() -> None:
    memory = {"name": "memory", "survives": "process", "restore_s": 1}
    parity = {"name": "parity", "survives": "nodes", "restore_s": 5}
    disk = {"name": "disk", "survives": "all", "restore_s": 60, "every": 20}
    mean = {}
    for name, levels in {"disk": [disk], "parity": [parity, disk], "all": [memory, parity, disk]}.items():
        scenario = load_scenario(overrides={"job.days": 20.0, "checkpoint.levels": levels})
        mean[name] = statistics.fmean(outcome.ettr for outcome in run_seeds(scenario, range(4)))
    assert mean["disk"] < mean["parity"] < mean["all"]


def test_a_run_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    scenario = load_scenario(
        overrides={"job.gpus": 1024, "failures.frailty": 1.0, "failures.burstiness": 2.0}
    )
    first, second = run_seeds(scenario, [7]), run_seeds(scenario, [7])
    assert first == second
    assert run_seeds(scenario, [8]) != first


def test_confidence_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for num in (2, 3, 5, 10):
        held = 0
        for _ in range(2000):
            found = estimate(rng.normal(1.0, 0.1, num).tolist())
            held += found.low <= 1.0 <= found.high
        assert held / 2000 == pytest.approx(0.95, abs=0.015)
    assert math.isnan(estimate([1.0]).low)


def test_a_month_of_100_000_gpus_is_replayed_one_event_at_a_time_and_no_save() -> None:
    scenario: Scenario = replace(load_scenario(overrides={"job.gpus": 100_000, "job.spare_nodes": 2000}))
    (found,) = run_seeds(scenario, [0])
    assert found.saves > 10_000
    assert 1_000 < found.num_events < 30_000
