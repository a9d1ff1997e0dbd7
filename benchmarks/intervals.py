"""How sure a measured ratio is.

Contenders that run in turn within a round meet the same disturbances, so ratios are taken round by round and their
median counts. Its interval is bootstrapped: rounds are drawn with replacement, again and again, and 95 % of the medians
lie in it. No shape of the noise is assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the bounds between which it lies with 95 % confidence."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance of the bounds."""
        return (self.high - self.low) / 2

    def resolved(self, *, at_least: float, allowed: float) -> float:
        """The median if the rounds tell on which side of ``at_least`` it lies, otherwise NaN.

        For overheads of a few per cent: both bounds must be on one side, and the half-width at most ``allowed``, the
        overhead that the target allows. A wide interval around a good median is not a result.
        """
        decided = self.low >= at_least or self.high < at_least
        return self.median if decided and self.half_width <= allowed else math.nan

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Interval:
    """Median over rounds of numerator / denominator; both have one number a round, at least one."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    draws = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high))
