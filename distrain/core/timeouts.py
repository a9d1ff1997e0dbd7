"""The ladder of timeouts: collective < step < heartbeat < barrier < job.

Each rung waits for what the rung below may take. If a step timed out before a collective does, the step would be
blamed for a hung collective and the more exact message would never be seen; if a heartbeat ran out within a slow
but healthy step, a living rank would be shot. So the order is checked before anything starts.
"""

from itertools import pairwise

from .config import TimeoutConfig
from .errors import Problem

LADDER = ("collective_s", "step_s", "heartbeat_s", "barrier_s", "job_s")
MAX_S = 10 * 365 * 24 * 3600.0
"""longest timeout; c10d counts in milliseconds and a Python timedelta ends at 10^9 days"""


def check_ladder(timeouts: TimeoutConfig) -> list[Problem]:
    """Every rung that is out of range, and every pair of rungs in the wrong order."""
    seconds = {name: float(getattr(timeouts, name)) for name in LADDER}
    problems = [
        Problem(f"timeouts.{name} is out of range", f"{value:g} s", f"more than 0 and at most {MAX_S:g} s")
        for name, value in seconds.items()
        if not 0 < value <= MAX_S
    ]
    for lower, upper in pairwise(LADDER):
        if seconds[lower] >= seconds[upper]:
            problems.append(
                Problem(
                    f"timeouts.{upper} must be longer than timeouts.{lower}",
                    f"{upper} = {seconds[upper]:g}, {lower} = {seconds[lower]:g}",
                    " < ".join(LADDER),
                    f"--set timeouts.{upper}={2 * seconds[lower]:g}",
                )
            )
    return problems
