"""The same problem as a mixed-integer program (MEMO section 4.2, level 1): proofs for small ones, and neighbourhoods.

For buffers i with address A_i and size S_i, and every pair that lives at one time::

    min M    A_i + S_i <= M
             A_i + S_i <= A_j + U (1 - z_ij)      z_ij = 1: i lies below j
             A_j + S_j <= A_i + U z_ij            U: a peak that is known to be reachable

Addresses are fractions of U, so that the numbers suit the solver. Its answer is read as an order only: buffers are put
down anew, lowest first, each as low as it can go, in whole numbers. So rounding cannot make a plan invalid, and the
bound is taken back by the solver's tolerance before it is rounded up to the next peak that is possible at all.

With ``free`` only pairs among those buffers may change sides and all others keep their order: a neighbourhood of a
plan, small enough for problems that are not.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray

from distrain.core.errors import InfeasibleError, UndecidedError

from ..solve import solve
from .bounds import Sections
from .skyline import first_fit

_TOLERANCE = 2e-6  # of the solver, relative to U


@dataclass(frozen=True, slots=True)
class Program:
    """What the solver made of it."""

    peak: int | None
    offsets: tuple[int, ...]
    lower_bound: int
    """proven, for all plans; with ``free`` only the bound that was given"""
    seconds: float


def pairs(cut: Sections) -> NDArray[np.int64]:
    """All pairs (i < j) that live at one time: [num_pairs, 2]."""
    meets = (cut.lower[:, None] < cut.upper[None, :]) & (cut.lower[None, :] < cut.upper[:, None])
    return np.argwhere(np.triu(meets, 1))


def minimise(
    cut: Sections,
    *,
    upper_bound: int,
    lower_bound: int,
    time_limit_s: float,
    start: Sequence[int] = (),
    free: Collection[int] | None = None,
) -> Program:
    """A plan with a peak of ``upper_bound`` or less, as low as can be found in time.

    Args:
        cut: buffers in sections.
        upper_bound: a peak that is reachable.
        lower_bound: a peak below which nothing is.
        time_limit_s: for the solver.
        start: offsets of a plan with that peak, from which to begin; needed with ``free``.
        free: buffers whose pairs may change sides; all if it is None.
    """
    num, unit = len(cut.size), float(upper_bound)
    sizes = [int(size) / unit for size in cut.size]
    program = pulp.LpProblem("buffers", pulp.LpMinimize)
    peak = program.add_variable("peak", lower_bound / unit, 1.0)
    program += peak
    address = [program.add_variable(f"a{i}", 0.0, 1.0 - sizes[i]) for i in range(num)]
    for i in range(num):
        program += address[i] + sizes[i] <= peak
    for i, j in pairs(cut).tolist():
        if free is not None and not (i in free and j in free):
            low, high = (i, j) if start[i] < start[j] else (j, i)
            program += address[low] + sizes[low] <= address[high]
            continue
        below = program.add_variable(f"z{i}_{j}", cat=pulp.LpBinary)
        program += address[i] + sizes[i] <= address[j] + (1 - below)
        program += address[j] + sizes[j] <= address[i] + below
        if start:
            below.setInitialValue(int(start[i] < start[j]))
    if start:
        peak.setInitialValue(1.0)
        for i in range(num):
            address[i].setInitialValue(start[i] / unit)
    try:
        found = solve(program, time_limit_s=time_limit_s, warm_start=bool(start))
    except (InfeasibleError, UndecidedError):
        # Infeasible is impossible, since upper_bound is reachable, but for what rounding cut off.
        return Program(None, (), lower_bound, time_limit_s)
    offsets = _settled(cut, [float(each.value()) for each in address])
    reached = max((offset + int(size) for offset, size in zip(offsets, cut.size, strict=True)), default=0)
    bound = lower_bound
    if free is None and math.isfinite(found.bound):
        steps = math.ceil((found.bound - _TOLERANCE) * unit / cut.step)
        bound = max(lower_bound, min(steps * cut.step, reached))
    return Program(reached, offsets, bound, found.seconds)


def _settled(cut: Sections, addresses: Sequence[float]) -> tuple[int, ...]:
    """Whole offsets in the order of ``addresses``, each as low as it can go.

    What is smaller than the tolerance has no order that means anything: it also goes last, into what is left.
    """
    order = np.argsort(np.array(addresses), kind="stable").astype(np.int32)
    tiny = cut.size[order] < 10 * _TOLERANCE * cut.size.sum()
    found = [
        first_fit(cut, each, best=False) for each in (order, np.concatenate((order[~tiny], order[tiny])))
    ]
    _, offsets = min(found, key=lambda pair: pair[0])
    return tuple(offsets.tolist())
