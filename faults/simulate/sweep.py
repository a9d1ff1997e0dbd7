"""Several seeds for confidence, several intervals for the best one.

Each seed draws its failures once, and all intervals meet the same ones (common random numbers): the curve over
intervals is then smooth where its points alone would be noise, and few seeds are enough to find its top.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .job import Outcome, replay
from .scenario import Scenario

_GRID = 17
_SPAN = 8.0  # of the grid: from this factor below the closed form's interval to this factor above
_REFINED = 9

Progress = Callable[[], None]
"""called after every simulated run"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the interval that holds the true one with 95 % confidence (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, slots=True)
class Curve:
    """ETTR over the interval."""

    points: tuple[tuple[float, Estimate], ...]
    """interval in seconds and ETTR, by interval"""

    @property
    def best(self) -> tuple[float, Estimate]:
        """The point with the largest mean."""
        return max(self.points, key=lambda point: point[1].mean)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of ``values``; with one value its interval is not known (NaN)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def run_seeds(
    scenario: Scenario, seeds: Sequence[int], *, progress: Progress = lambda: None
) -> tuple[Outcome, ...]:
    """What becomes of the job, by seed; only the first keeps its spans, which are most of the memory."""
    outcomes: list[Outcome] = []
    for seed in seeds:
        failures = scenario.failures_of(seed)
        outcome = replay(scenario.policy(scenario.interval_s(failures)), failures)
        outcomes.append(replace(outcome, spans=()) if outcomes else outcome)
        progress()
    return tuple(outcomes)


def num_runs(seeds: Sequence[int]) -> int:
    """Runs that a search makes, at most."""
    return len(seeds) * (_GRID + _REFINED)


def search(scenario: Scenario, seeds: Sequence[int], *, progress: Progress = lambda: None) -> Curve:
    """ETTR over a grid around the closed form's interval, and over a finer one around its best point."""
    drawn = [scenario.failures_of(seed) for seed in seeds]
    least_s = scenario.shortest_interval_s

    def at(interval_s: float) -> Estimate:
        values = []
        for failures in drawn:
            values.append(replay(scenario.policy(interval_s), failures).ettr)
            progress()
        return estimate(values)

    middle_s = scenario.with_auto().interval_s(drawn[0])
    grid = _geometric(max(least_s, middle_s / _SPAN), min(scenario.horizon_s, middle_s * _SPAN), _GRID)
    points = {interval_s: at(interval_s) for interval_s in grid}
    top = max(range(len(grid)), key=lambda index: points[grid[index]].mean)
    for interval_s in _geometric(grid[max(top - 1, 0)], grid[min(top + 1, len(grid) - 1)], _REFINED):
        if interval_s not in points:
            points[interval_s] = at(interval_s)
    return Curve(tuple(sorted(points.items())))


def _geometric(low: float, high: float, num: int) -> list[float]:
    if low >= high:
        return [low]
    return [low * (high / low) ** (index / (num - 1)) for index in range(num)]


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by the expansion around the normal one; exact for 1 and 2."""
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
