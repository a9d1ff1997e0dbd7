"""The constants of the cost model, from groups that were timed.

The model is linear in its constants once the bandwidth is written as its inverse s_d::

    ms  =  alpha1 * sum L^2 / d  +  alpha2 * sum L / d  +  beta1  +  s_d * C sum L / d        s_1 = 0

so the constants that explain the samples best are the solution of a linear program: least sum of *relative*
deviations, none of them negative. Deviations rather than squares, because a sample that another process disturbed is
far off and must not pull the others with it; relative, because plans weigh short groups against long ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median

import pulp

from distrain.core.errors import Problem, raise_if
from distrain.planners.solve import solve

from .cost import SequenceCost

FASTEST_GB_S = 1e5
"""bandwidth at which communication counts as free: what is measured so cannot be told from nothing"""


@dataclass(frozen=True, slots=True)
class Sample:
    """A group of ``degree`` that took ``ms`` for sequences of these ``lengths``."""

    lengths: tuple[int, ...]
    degree: int
    ms: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A cost model, and how far it is from what it was fitted to."""

    cost: SequenceCost
    errors: tuple[float, ...]
    """predicted over measured, less one, of each sample"""

    @property
    def mean_error(self) -> float:
        """Mean of the relative errors, without their signs."""
        return fmean(map(abs, self.errors))

    @property
    def worst_error(self) -> float:
        """The largest of them."""
        return max(map(abs, self.errors))


def fit(
    samples: Sequence[Sample],
    *,
    layers: int,
    hidden: int,
    tokens_per_gpu: int,
    max_degree: int | None = None,
) -> Fit:
    """The cost model of a model of ``layers`` and ``hidden``, whose groups took what ``samples`` say.

    Raises:
        ConfigError: the samples leave a constant undetermined, or are no times; lists every problem.
    """
    raise_if(_problems(samples))
    start = SequenceCost(
        alpha1=0.0,
        alpha2=0.0,
        beta1=0.0,
        layers=layers,
        hidden=hidden,
        tokens_per_gpu=tokens_per_gpu,
        max_degree=max_degree,
    )
    rows = [_row(sample, start.megabytes_per_token) for sample in samples]
    names = sorted({name for row in rows for name in row})
    found = _least_deviation(rows, [sample.ms for sample in samples], names)
    cost = replace(
        start,
        alpha1=found["alpha1"],
        alpha2=found["alpha2"],
        beta1=found["beta1"],
        bandwidth_gb_s={
            int(name): 1 / max(found[name], 1 / FASTEST_GB_S) for name in names if name.isdecimal()
        },
    )
    errors = [cost.group_ms(sample.lengths, sample.degree) / sample.ms - 1 for sample in samples]
    return Fit(cost, tuple(errors))


def bytes_per_token(samples: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """What stays, and what each token adds, of (tokens, bytes) that were measured: median slope through the median.

    Raises:
        ConfigError: fewer than two different numbers of tokens.
    """
    ordered = sorted(samples)
    slopes = [(b1 - b0) / (t1 - t0) for (t0, b0), (t1, b1) in pairwise(ordered) if t1 > t0]
    if not slopes:
        raise_if([Problem("memory was measured for one number of tokens only", repr(samples), "two or more")])
    slope = median(slopes)
    return median(num_bytes - slope * tokens for tokens, num_bytes in ordered), slope


def _row(sample: Sample, megabytes_per_token: float) -> dict[str, float]:
    """Coefficients of the constants, by their names; bandwidths go by their degree."""
    tokens, degree = sum(sample.lengths), sample.degree
    row = {
        "alpha1": sum(length * length for length in sample.lengths) / degree,
        "alpha2": tokens / degree,
        "beta1": 1.0,
    }
    return row if degree == 1 else {**row, str(degree): megabytes_per_token * tokens / degree}


def _least_deviation(
    rows: Sequence[dict[str, float]], measured: Sequence[float], names: Sequence[str]
) -> dict[str, float]:
    # Each constant is counted in the unit that would explain a typical sample alone: solvers want numbers near 1.
    units = {
        name: median(ms / row[name] for row, ms in zip(rows, measured, strict=True) if row.get(name))
        for name in names
    }
    program = pulp.LpProblem("fit", pulp.LpMinimize)
    constants = {name: program.add_variable(f"c_{name}", lowBound=0) for name in names}
    deviations = [program.add_variable(f"e_{index}", lowBound=0) for index in range(len(rows))]
    program += pulp.lpSum(deviations)
    for row, ms, deviation in zip(rows, measured, deviations, strict=True):
        off = pulp.lpSum(units[name] * value / ms * constants[name] for name, value in row.items()) - 1
        program += deviation >= off
        program += deviation >= -off
    solve(program)
    return {name: units[name] * constants[name].value() for name in names}


def _problems(samples: Sequence[Sample]) -> list[Problem]:
    problems = [
        Problem(
            "a sample is no measurement", repr(sample), "lengths and milliseconds above 0, a degree from 1 on"
        )
        for sample in samples
        if not sample.lengths or min(sample.lengths) < 1 or sample.degree < 1 or not sample.ms > 0
    ]
    shapes = {(sample.degree, sample.lengths) for sample in samples}
    if len({lengths for _, lengths in shapes}) < 3:
        problems.append(
            Problem(
                "too few different groups were timed", f"{len(shapes)}", "three or more of different lengths"
            )
        )
    return problems
