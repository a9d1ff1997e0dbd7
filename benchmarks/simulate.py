"""The goodput simulator against what was published, against mathematics, and against the clock.

Published: Llama 3 405B trained effectively for more than 90 % of 54 days on 16,384 GPUs with 419 unexpected and 47
planned interruptions (arXiv 2407.21783, section 3.3.4). ``llama3_ettr_error`` is the distance of the simulated mean
from 0.90. The parameters are the defaults of ``faults/simulate/scenario.py``, which says of each whether it was
published; they were chosen before the first run and are not fitted. The rows that follow change one assumption each,
so that everybody sees how much hangs on it.

Mathematics: no failure, exactly one, and exponential failures (Daly's expectation, and its best interval). The clock:
30 days of 16,384 GPUs, drawing the failures included; an event is a failure or a change of what the job does.
"""

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from distrain.faults.simulate import Cause, load_scenario, replay, run_seeds, search
from distrain.faults.simulate.closed_forms import (
    best_interval_s,
    ettr,
    ettr_with_one_failure,
    ettr_without_failure,
)
from distrain.faults.simulate.failures import DAY_S
from distrain.faults.simulate.sweep import estimate

from .exact import job, one_failure, poisson
from .harness import Session, main

PUBLISHED = 0.90
LLAMA3: Mapping[str, Any] = {"job.days": 54.0}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as stated": {},
    "every save stalls for 4 GB a GPU (33 s)": {"checkpoint.stall_s": 32.768},
    "a save an hour": {"checkpoint.interval_s": 3600.0},
    "ten minutes to detect (every failure)": {"recovery.crash_detect_s": 600.0},
    "restarting takes ten minutes": {"recovery.restart_s": 600.0},
    "16 spare nodes": {"job.spare_nodes": 16},
    "bursts, repeat offenders, 10 % whole racks": {
        "failures.burstiness": 1.76,
        "failures.frailty": 1.5,
        "failures.correlated": 0.1,
    },
}
POLICY: Mapping[str, float] = {"interval_s": 1200.0, "stall_s": 20.0, "recovery_s": 300.0}
HORIZON_S = 400 * DAY_S
MTBF_S = 4 * 3600.0


def run(session: Session) -> None:
    """All of it."""
    seeds = range(3 if session.quick else 20)
    _llama3(session, seeds)
    _closed_forms(session, seeds)
    _speed(session)


def _llama3(session: Session, seeds: range) -> None:
    for name, changes in VARIANTS.items():
        outcomes = run_seeds(load_scenario(overrides={**LLAMA3, **changes}), seeds)
        found = estimate([outcome.ettr for outcome in outcomes])
        lost = {
            cause: statistics.fmean(outcome.seconds[cause] / outcome.horizon_s for outcome in outcomes)
            for cause in Cause
        }
        session.row(
            llama3=name,
            ettr=found.mean,
            low=found.low,
            high=found.high,
            failures=statistics.fmean(sum(outcome.failures.values()) for outcome in outcomes),
            **{f"{cause}_pct": 100 * share for cause, share in lost.items() if cause is not Cause.TRAINING},
        )
        if not changes:
            session.metric(
                "llama3_ettr_error",
                abs(found.mean - PUBLISHED),
                at_most=0.03,
                note=f"simulated {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}], published > 0.90",
            )


def _closed_forms(session: Session, seeds: range) -> None:
    """Relative errors."""
    saving = {key: POLICY[key] for key in ("interval_s", "stall_s")}
    at_s = 0.37 * DAY_S
    best = {**POLICY, "interval_s": best_interval_s(stall_s=POLICY["stall_s"], mtbf_s=MTBF_S)}
    exponential = [
        replay(job(**best, horizon_s=HORIZON_S), poisson(MTBF_S, horizon_s=HORIZON_S, seed=seed)).ettr
        for seed in seeds
    ]
    expected = {
        "no_failure": (
            replay(job(**POLICY, horizon_s=HORIZON_S), poisson(math.inf, horizon_s=HORIZON_S, seed=0)).ettr,
            ettr_without_failure(**saving),
        ),
        "one_failure": (
            replay(job(**POLICY, horizon_s=DAY_S), one_failure(at_s)).ettr,
            ettr_with_one_failure(**POLICY, horizon_s=DAY_S, failure_s=at_s),
        ),
        "young_daly": (statistics.fmean(exponential), ettr(**best, mtbf_s=MTBF_S)),
    }
    for name, (simulated, formula) in expected.items():
        session.row(closed_form=name, simulated=simulated, formula=formula)
        session.metric(f"{name}_error", abs(simulated / formula - 1), at_most=0.01)


def _speed(session: Session) -> None:
    for gpus, spares in ((16_384, 1024), (100_000, 6250)):
        scenario = load_scenario(overrides={"job.gpus": gpus, "job.spare_nodes": spares})
        seconds, rates = [], []
        for seed in range(max(session.rounds, 3)):
            start = time.perf_counter()
            (outcome,) = run_seeds(scenario, [seed])
            seconds.append(time.perf_counter() - start)
            rates.append(outcome.num_events / seconds[-1])
        session.row(gpus=gpus, month_s=statistics.median(seconds), events_per_s=statistics.median(rates))
        if gpus == 16_384:
            session.metric("month_s", statistics.median(seconds), at_most=10.0, note="30 days, 16,384 GPUs")
            session.metric("events_per_s", statistics.median(rates))
    if not session.quick:
        start = time.perf_counter()
        best_s, found = search(load_scenario(), range(10)).best
        session.row(search_s=time.perf_counter() - start, best_interval_s=best_s, ettr=found.mean)


if __name__ == "__main__":
    main("simulate", run)
