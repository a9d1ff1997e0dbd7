"""What mathematics knows about goodput; tests and ``docs/simulate.md`` hold the simulation against it.

With exponential failures of mean M, a stall of d a save, and R to recover (in which failures may strike too), a stretch
of T useful seconds takes ``M e^(R/M) (e^((T + d)/M) - 1)`` on average (Daly 2006). The T that makes
useful over elapsed time largest solves ``(1 - T/M) e^((T + d)/M) = 1``: exactly, where Young (1974) has
``sqrt(2 d M)`` and Daly a series.
"""

import math


def ettr(*, interval_s: float, stall_s: float, mtbf_s: float, recovery_s: float) -> float:
    """Expected share of useful training under exponential failures; R is everything from failure to training."""
    stretch_s = mtbf_s * math.exp(recovery_s / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    return interval_s / stretch_s


def best_interval_s(*, stall_s: float, mtbf_s: float) -> float:
    """The interval with the largest ``ettr``; it does not depend on the time to recover. 0 for a stall of 0."""
    stall = stall_s / mtbf_s
    x = min(math.sqrt(2 * stall), 1.0)
    for _ in range(50 if x else 0):  # Newton; from Young's estimate four or five steps are enough
        step = (1 - x - math.exp(-x - stall)) / x
        x += step
        if abs(step) < 1e-14:
            break
    return x * mtbf_s


def ettr_without_failure(*, interval_s: float, stall_s: float) -> float:
    """Only saving costs."""
    return interval_s / (interval_s + stall_s)


def ettr_with_one_failure(
    *, horizon_s: float, failure_s: float, interval_s: float, stall_s: float, recovery_s: float
) -> float:
    """One failure at ``failure_s``: what was not saved is lost, and so is the recovery."""
    cycle_s = interval_s + stall_s

    def work_s(seconds: float) -> float:
        whole, rest_s = divmod(seconds, cycle_s)
        return whole * interval_s + min(rest_s, interval_s)

    kept_s = failure_s // cycle_s * interval_s
    return (kept_s + work_s(max(0.0, horizon_s - failure_s - recovery_s))) / horizon_s
