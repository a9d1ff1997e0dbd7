"""How often to save: Young's and Daly's optimum, within a budget.

A save that stalls training for ``stall_s`` every T seconds costs stall / T; a failure every ``mtbf_s`` on average loses
T / 2. The sum is least at T = sqrt(2 stall MTBF) (Young 1974); Daly (2006) adds terms that matter when the stall is not
small against the MTBF. Only the stall counts, not the time until the bytes are durable, but a save cannot start
more often than one can be flushed.
"""

import math


def optimal_interval_s(*, stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order estimate of the time between two saves, in seconds."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def interval_s(*, stall_s: float, mtbf_s: float, flush_s: float, num_slots: int, budget: float) -> float:
    """Seconds between saves: the optimum, but at least what ``budget`` (stall over time) and flushing allow."""
    optimum = optimal_interval_s(stall_s=stall_s, mtbf_s=mtbf_s)
    return max(optimum, stall_s / budget, flush_s / max(1, num_slots - 1))
