"""Sequences of equal length as one class with a count: what the bound reasons about.

Where there are more lengths than the bound has time for, neighbours are merged by shortening the longer ones. A plan
for the true lengths is a plan for shorter ones too, and takes no less, so a bound for the classes holds for the
sequences.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .problem import Floats, StepProblem

MOST_CLASSES = 200


@dataclass(frozen=True)
class LengthClasses:
    """K lengths, descending, each with its number of sequences; D degrees."""

    problem: StepProblem
    lengths: Floats
    counts: Floats

    @classmethod
    def of(cls, problem: StepProblem, *, most: int = MOST_CLASSES) -> "LengthClasses":
        """The classes of a problem, at most ``most`` of them."""
        ascending, numbers = np.unique(problem.lengths, return_counts=True)
        lengths, counts = ascending[::-1].copy(), numbers[::-1].astype(np.float64)
        while len(lengths) > max(1, most):
            lost = (lengths[:-1] - lengths[1:]) * counts[:-1]
            least = int(np.argmin(lost))
            counts[least + 1] += counts[least]
            lengths, counts = np.delete(lengths, least), np.delete(counts, least)
        return cls(problem, lengths, counts)

    @cached_property
    def times(self) -> Floats:
        """ms of a sequence of each class at each degree (K x D)."""
        cost = self.problem.cost
        return np.column_stack([cost.sequence_ms(self.lengths, degree) for degree in self.problem.degrees])

    @cached_property
    def fits(self) -> "np.ndarray[tuple[int, int], np.dtype[np.bool_]]":
        """Whether a group of each degree holds a sequence of each class (K x D)."""
        return self.lengths[:, None] <= self.problem.capacities

    @cached_property
    def areas(self) -> Floats:
        """Least slots times ms of a sequence of each class (K)."""
        slots = np.array(self.problem.degrees, dtype=np.float64)
        return np.where(self.fits, self.times * slots, np.inf).min(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def least_ms(self) -> Floats:
        """No wave with a sequence of each class is shorter (K)."""
        return np.where(self.fits, self.times, np.inf).min(axis=1)  # type: ignore[no-any-return]

    def longest(self, num: int) -> float:
        """The length of which at most ``num`` sequences are longer; -1 if there are no more than ``num`` at all."""
        beyond = np.flatnonzero(np.cumsum(self.counts) > num)
        return float(self.lengths[beyond[0]]) if beyond.size else -1.0

    def count(self, lengths: Floats) -> Floats:
        """How many of ``lengths`` (of this problem) belong to each class (K)."""
        classes = np.searchsorted(-self.lengths, -lengths)  # the longest class that is not longer
        return np.bincount(classes, minlength=len(self.lengths)).astype(np.float64)
