"""Jobs and failures so simple that mathematics knows what becomes of them; for the benchmark and for tests."""

import math

import numpy as np

from distrain.faults.simulate import (
    FailureClass,
    FailureProcess,
    Failures,
    Job,
    Level,
    Recovery,
    Survives,
    draw,
)
from distrain.faults.simulate.failures import DAY_S

NUM_NODES = 4


def job(*, interval_s: float, stall_s: float, recovery_s: float, horizon_s: float) -> Job:
    """No spares, one level that every failure spares; recovering has four parts of the same length."""
    part_s = recovery_s / 4
    return Job(
        num_nodes=NUM_NODES,
        num_spares=0,
        horizon_s=horizon_s,
        interval_s=interval_s,
        stall_s=stall_s,
        levels=(Level(name="storage", survives=Survives.ALL, restore_s=part_s),),
        recovery=Recovery(
            crash_detect_s=part_s,
            hang_detect_s=0,
            corruption_detect_s=0,
            diagnose_s=part_s,
            restart_s=part_s,
        ),
    )


def poisson(mtbf_s: float, *, horizon_s: float, seed: int) -> Failures:
    """Crashes of a job of ``NUM_NODES`` nodes, exponentially distributed; none if ``mtbf_s`` is infinite."""
    crash = FailureClass(name="crash", per_1000_node_days=1000 * DAY_S / mtbf_s / NUM_NODES)
    return draw(FailureProcess(classes=(crash,)), num_nodes=NUM_NODES, horizon_s=horizon_s, seed=seed)


def one_failure(at_s: float) -> Failures:
    """A single crash."""
    crash = poisson(math.inf, horizon_s=1.0, seed=0).classes
    zero = np.zeros(1, np.int64)
    return Failures(crash, np.array([at_s]), zero, zero, np.zeros(1))
