"""A certificate: what no lock-step plan can beat, by column generation over whole micro-batches.

A plan is a set of waves (micro-batches), and its time the sum of their durations T and fixed costs b. Over all waves w
that could exist, with a_kw sequences of class k, the linear program::

    min  sum (T_w + b) x_w     sum_w a_kw x_w >= c_k     m_low <= sum x_w <= m_high

is a lower bound. Its strength: a wave is whole, so the waves that hold the longest sequence weigh at least 1 together,
last as long as it does, and have only so much memory for anything else.

*Dual.* Prices pi_k >= 0 and a price sigma of a wave, with  pi a + sigma <= T + b  for every wave, prove
pi c + sigma m. ``pricing.py`` bounds how far any wave violates that. If in each class of durations [g, ...] the
violation is at most delta, then prices scaled by  theta = min (g + b) / (g + b + delta)  violate nothing (Farley), so
theta (pi c + sigma m) is a bound after *every* pricing, also when a solver stops on its time limit.

*Fewer prices.* Restricting prices keeps them valid: the longest sequences have their own, the rest share hat functions
of the length, and two more directions are the price of the area and of the length. The area price is where the search
starts, so the bound is never below the area bound.

*Branches.* Plans with m waves, with more, and with fewer, where m is that of the best plan known, are bounded apart.

*Stabilisation.* Prices are tried between the best so far and the optimum of the master problem, and a trial ends as
soon as it cannot improve the bound and has shown some new waves.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import highspy
import numpy as np

from .length_classes import LengthClasses
from .pricing import Pricing, Rows, solver
from .problem import Floats, StepProblem

_RATIO = 1.15  # of neighbouring durations
_INTEGERS = 15  # longest sequences that are not cut
_SINGLES, _KNOTS = 4, 3  # prices of their own; hat functions in each band of equal least degree
_SLICE_S = 3.0  # on one branch
_SAFETY = 1 - 1e-6
_NOTHING_MS = 1e-9  # a wave may take no time at all


@dataclass(frozen=True, slots=True)
class Certificate:
    """No lock-step plan takes less than ``bound_ms``."""

    bound_ms: float
    seconds: float
    closed: bool
    """the bound cannot be raised by more time"""


def certify(
    problem: StepProblem,
    *,
    estimated_ms: float,
    num_waves: int,
    waves: Iterable[tuple[float, Sequence[float]]] = (),
    seconds: float,
    classes: LengthClasses | None = None,
    integers: int = _INTEGERS,
    ratio: float = _RATIO,
    accuracy: float = 1e-3,
) -> Certificate:
    """Bound the time of every plan, within ``seconds``.

    ``estimated_ms`` and ``num_waves`` are those of a plan that is known, and ``waves`` its durations (without b) and
    lengths, which only save time.
    """
    start = time.monotonic()
    deadline = start + seconds
    if problem.area_bound_ms >= estimated_ms:  # nothing is left to prove
        return Certificate(estimated_ms, 0.0, True)
    classes = classes or LengthClasses.of(problem)
    shared = _Shared.of(
        problem, classes, estimated_ms, waves, integers=integers, ratio=ratio, accuracy=accuracy
    )
    least = problem.least_waves
    num_waves = max(num_waves, least)
    limits: list[tuple[int, int | None]] = [(num_waves, num_waves), (num_waves + 1, None)]
    if num_waves > least:
        limits.append((least, num_waves - 1))
    branches = [_Branch(shared, low, high) for low, high in limits]
    while time.monotonic() < deadline:
        lowest = min(branches, key=lambda branch: branch.bound_ms)
        if lowest.done or lowest.bound_ms >= estimated_ms:
            break
        lowest.improve(min(deadline, time.monotonic() + _SLICE_S))
    lowest = min(branches, key=lambda branch: branch.bound_ms)
    bound_ms = min(lowest.bound_ms, estimated_ms)
    return Certificate(
        max(bound_ms, min(problem.area_bound_ms, estimated_ms)),
        time.monotonic() - start,
        lowest.done or lowest.bound_ms >= estimated_ms,
    )


@dataclass
class _Shared:
    """What the branches have in common: prices, pricing programs, and the waves that are known."""

    classes: LengthClasses
    basis: Floats
    """prices are combinations of these rows with weights >= 0; the last but one is the area (R x K)"""
    estimated_ms: float
    beta: float
    area_ms: float
    area_weight: float
    pricings: list[Pricing]
    accuracy: float
    columns: list[tuple[float, Floats]] = field(default_factory=list)
    """duration of a wave, and its sequences of each class"""

    @classmethod
    def of(
        cls,
        problem: StepProblem,
        classes: LengthClasses,
        estimated_ms: float,
        waves: Iterable[tuple[float, Sequence[float]]],
        *,
        integers: int,
        ratio: float,
        accuracy: float,
    ) -> "_Shared":
        area = classes.areas / problem.num_slots
        beta, least = problem.cost.beta1, problem.least_waves
        longest_ms = max(estimated_ms - least * beta, 1e-9)  # of a wave: the sum of all is no longer
        area_ms = float(area @ classes.counts)
        grid = _grid(float(classes.least_ms.min()), min(area_ms / least, longest_ms), longest_ms, ratio)
        above = classes.longest(integers)
        pricings = [Pricing(classes, low, high, integer_above=above) for low, high in pairwise(grid)]
        hats = _hats(classes)
        basis = np.vstack([*hats, area / (area.max() or 1.0), classes.lengths / classes.lengths.max()])
        columns = [(ms, classes.count(np.asarray(lengths, dtype=np.float64))) for ms, lengths in waves]
        return cls(
            classes, basis, estimated_ms, beta, area_ms, float(area.max()), pricings, accuracy, columns
        )


class _Branch:
    """Plans with ``low`` to ``high`` waves; ``improve`` goes on where it stopped."""

    def __init__(self, shared: _Shared, low: int, high: int | None) -> None:
        self.shared, self.low, self.high = shared, low, high
        self.bound_ms = shared.area_ms + shared.beta * low
        self.done = False
        num = len(shared.basis)
        self._rhs = shared.basis @ shared.classes.counts
        # One column for each wave, and an expensive one that serves everything, which keeps the prices finite.
        self._known = 0
        self._rows = [np.append(self._rhs, float(low))]
        self._limits = [1.02 * shared.estimated_ms]
        self._center = np.zeros(num + 1)
        self._center[num - 2], self._center[num] = shared.area_weight, shared.beta
        self._inward = 0.6  # weight of the best prices in a trial
        self._violations = np.zeros(len(shared.pricings))

    def improve(self, deadline: float) -> None:
        """Raise ``bound_ms`` until ``deadline``, or until the master problem shows that there is no more to gain."""
        while not self.done and time.monotonic() < deadline and self.bound_ms < self.shared.estimated_ms:
            optimum, master_ms = self._master()
            if master_ms <= self.bound_ms * (1 + self.shared.accuracy):
                self.done = True
                return
            trial = self._inward * self._center + (1 - self._inward) * optimum
            value, theta, new, complete = self._price(trial, optimum, master_ms, deadline)
            if value > self.bound_ms:
                self.bound_ms, self._center = value, trial * theta
                self._inward = max(0.3, self._inward - 0.1)
            elif new == 0:
                # At the optimum itself nothing violates the prices that pricing can find: this is the end.
                self.done = complete and self._inward == 0
                if complete:
                    self._inward = 0.0
            else:
                self._inward = min(0.85, max(self._inward, 0.3) + 0.05)

    def _waves(self, sigma: float) -> float:
        """The number of waves that the price of a wave counts for."""
        return float(self.low if sigma >= 0 or self.high is None else self.high)

    def _master(self) -> tuple[Floats, float]:
        """Prices that are best for the waves known so far, and their value."""
        for ms, counts in self.shared.columns[self._known :]:
            self._rows.append(np.append(self.shared.basis @ counts, 1.0))
            self._limits.append(ms + self.shared.beta)
        self._known = len(self.shared.columns)
        num = len(self._rhs)
        rows = Rows()
        for row, limit in zip(self._rows, self._limits, strict=True):
            rows.add(
                np.arange(num + 2), np.append(row, -row[-1]), limit
            )  # sigma is the difference of two columns
        costs = np.append(-self._rhs, [-float(self.low), float(self.high or 0)])
        most = np.full(num + 2, highspy.kHighsInf)
        if self.high is None:
            most[-1] = 0.0
        model = solver()
        rows.load(model, costs=costs, low=np.zeros(num + 2), high=most)
        model.run()
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return self._center, math.inf
        values = np.maximum(np.array(model.getSolution().col_value), 0)
        return np.append(
            values[:num], values[num] - values[num + 1]
        ), -model.getInfo().objective_function_value

    def _price(
        self, trial: Floats, optimum: Floats, master_ms: float, deadline: float
    ) -> tuple[float, float, int, bool]:
        """The bound that ``trial`` proves, its theta, how many waves were new, and whether all classes were priced."""
        shared, sigma = self.shared, trial[-1]
        duals = shared.basis.T @ trial[:-1]
        raw = float(duals @ shared.classes.counts) + sigma * self._waves(sigma)
        accuracy = (
            max(2e-4, 0.15 * (master_ms - self.bound_ms) / master_ms) if math.isfinite(master_ms) else 1e-3
        )
        theta, new, enough = 1.0, 0, shared.beta - sigma
        for index in np.argsort(-self._violations, kind="stable"):
            if time.monotonic() >= deadline:
                return -math.inf, theta, new, False
            pricing = shared.pricings[index]
            least_ms = pricing.low + shared.beta
            price = pricing.price(duals, enough=enough, tolerance=accuracy * least_ms)
            violation = max(0.0, price.bound - enough)
            self._violations[index] = 0.5 * self._violations[index] + violation / max(least_ms, _NOTHING_MS)
            if violation > 0:
                theta = min(theta, least_ms / (least_ms + violation))
            if price.counts is not None:
                row = np.append(shared.basis @ price.counts, 1.0)
                if row @ optimum > price.ms + shared.beta + 1e-7 * abs(master_ms):
                    shared.columns.append((price.ms, price.counts))
                    new += 1
            if theta * raw < self.bound_ms and new >= 4:
                return -math.inf, theta, new, False
        return theta * raw * _SAFETY, theta, new, True


def _grid(least_ms: float, typical_ms: float, longest_ms: float, ratio: float) -> list[float]:
    """Ends of the classes of durations: fine where waves are likely, from the shortest wave to the longest."""
    ends = [min(least_ms, longest_ms) * (1 - 1e-9)]
    following = max(0.35 * typical_ms, ends[0] * ratio)
    while following < min(longest_ms, 4.5 * typical_ms):
        ends.append(following)
        following *= ratio
    return [*ends, longest_ms * (1 + 1e-9)]


def _hats(classes: LengthClasses) -> list[Floats]:
    """Directions of the prices: the longest lengths alone, then hat functions within bands of equal least degree."""
    num = len(classes.lengths)
    singles = min(_SINGLES, num)
    rows = [np.eye(num)[each] for each in range(singles)]
    bands = classes.fits.argmax(axis=1)
    for band in np.unique(bands[singles:]):
        own = singles + np.flatnonzero(bands[singles:] == band)
        if len(own) <= _KNOTS:
            rows += [np.eye(num)[each] for each in own]
            continue
        lengths = classes.lengths[own]
        if band == 0:
            knots = np.unique(np.geomspace(lengths.min(), lengths.max(), _KNOTS + 1))
        else:
            knots = np.unique(np.quantile(lengths, np.linspace(0, 1, _KNOTS)))
        for at in range(len(knots)):
            row = np.zeros(num)
            row[own] = np.interp(lengths, knots, np.eye(len(knots))[at])
            rows.append(row)
    return rows
