"""What the most valuable micro-batch is worth, at most, if each sequence has a price.

Column generation asks for the wave with the greatest  (prices of its sequences) - (its duration T). Here waves are
relaxed: groups of one degree share their memory and their time, and short sequences may be cut. Any relaxation keeps
the bound valid; what makes this one strong is what it does not relax. For durations between ``low`` and ``high``, with
x_kd sequences of class k in the y_d groups of degree d::

    sum_d x_kd <= c_k                       a sequence serves once
    sum_k L_k x_kd <= E d y_d               memory of the groups of a degree
    sum_k t_kd x_kd <= high y_d             and their time
    sum_d d y_d <= N,  y integer            slots
    sum_kd d t_kd x_kd <= N T               area, with the true duration
    sum_d t_kd x_kd <= T                    a long sequence, alone in its class, forces the duration
    sum_k u_q(t_kd / high) x_kd <= y_d      at most q sequences larger than 1/(q+1) of a group fit into it, for time
    sum_k u_q(L_k / (E d)) x_kd <= y_d      and for memory: the dual-feasible functions of Fekete and Schepers

x is integer for the longest sequences. The linear relaxation is tried first, and is often enough.
"""

import math
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .length_classes import LengthClasses
from .problem import Floats

Indices = NDArray[np.intp]

_STEPS = (1, 2, 3)
_LIMIT_S = 0.3  # of one mixed-integer program
_SAFETY = 1e-7  # relative; HiGHS is exact to its tolerances only


@dataclass(frozen=True, slots=True)
class Price:
    """No wave of the class is worth more than ``bound``; the one found may be new to the master."""

    bound: float
    counts: Floats | None = None
    """sequences of each class in the most valuable wave found (K)"""
    ms: float = 0.0
    """its duration"""


class Rows:
    """Rows of a linear program, each  sum of value * column <= limit."""

    def __init__(self) -> None:
        self._columns: list[Floats] = []
        self._values: list[Floats] = []
        self._limits: list[float] = []

    def add(self, columns: ArrayLike, values: ArrayLike, limit: float) -> None:
        """One row; no column may come twice."""
        self._columns.append(np.asarray(columns, dtype=np.float64))
        self._values.append(np.asarray(values, dtype=np.float64))
        self._limits.append(limit)

    def load(self, model: highspy.Highs, *, costs: Floats, low: Floats, high: Floats) -> None:
        """Minimise ``costs`` between ``low`` and ``high`` under these rows."""
        num = len(costs)
        model.addVars(num, low, high)
        model.changeColsCost(num, np.arange(num, dtype=np.int32), costs)
        starts = np.cumsum([0, *map(len, self._columns)])[:-1].astype(np.int32)
        columns = np.concatenate(self._columns).astype(np.int32)
        values = np.concatenate(self._values)
        least = np.full(len(self._limits), -highspy.kHighsInf)
        model.addRows(len(starts), least, np.array(self._limits), len(columns), starts, columns, values)


def solver(**options: float) -> highspy.Highs:
    """HiGHS without output, on one thread."""
    model = highspy.Highs()
    model.silent()
    for name, value in {"threads": 1, **options}.items():
        model.setOptionValue(name, value)
    return model


class Pricing:
    """The relaxed waves whose duration is between ``low`` and ``high`` ms."""

    def __init__(self, classes: LengthClasses, low: float, high: float, *, integer_above: float) -> None:
        self.low, self.num_classes = low, len(classes.lengths)
        cap = high * (1 + 1e-9)
        self.k, degree = np.nonzero(classes.fits & (classes.times <= cap))
        num, problem = len(self.k), classes.problem
        degrees = np.array(problem.degrees, dtype=np.float64)
        groups, duration = num + np.arange(len(degrees)), num + len(degrees)
        rows = _rows(classes, self.k, degree, high, integer_above)
        costs = np.concatenate([np.zeros(num + len(degrees)), [1.0]])
        least = np.concatenate([np.zeros(num + len(degrees)), [low]])
        most = np.concatenate([classes.counts[self.k], np.floor(problem.num_slots / degrees), [high]])
        self._linear, self._integer = solver(), solver(time_limit=_LIMIT_S, mip_rel_gap=0.0)
        for model in (self._linear, self._integer):
            rows.load(model, costs=costs, low=least, high=most)
        whole = np.concatenate([np.flatnonzero(classes.lengths[self.k] > integer_above), groups]).astype(
            np.int32
        )
        kinds = np.array([highspy.HighsVarType.kInteger] * len(whole))
        self._integer.changeColsIntegrality(len(whole), whole, kinds)
        self._columns, self._duration = np.arange(num, dtype=np.int32), duration

    def price(self, duals: Floats, *, enough: float, tolerance: float) -> Price:
        """Bound what a wave is worth under ``duals``: as far as ``enough``, or to ``tolerance``."""
        costs = -duals[self.k]
        num = len(costs)
        self._linear.changeColsCost(num, self._columns, costs)
        self._linear.run()
        bound = math.inf
        if self._linear.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            bound = _up(-self._linear.getInfo().objective_function_value)
        if bound <= enough:
            return Price(bound)
        self._integer.changeColsCost(num, self._columns, costs)
        self._integer.setOptionValue("mip_abs_gap", tolerance)
        self._integer.clearSolver()
        self._integer.run()
        info = self._integer.getInfo()
        if math.isfinite(info.mip_dual_bound):
            bound = min(bound, _up(-info.mip_dual_bound))
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Price(bound)
        values = np.array(self._integer.getSolution().col_value)
        counts = np.bincount(self.k, values[:num], self.num_classes).astype(np.float64)
        return Price(bound, counts, float(values[self._duration]))


def _rows(classes: LengthClasses, k: Indices, degree: Indices, high: float, integer_above: float) -> Rows:
    """The rows above; column i is x of class k[i] at degree[i], then come y and T."""
    problem = classes.problem
    num, slots = len(k), np.array(problem.degrees, dtype=np.float64)
    first_y, duration = num, num + len(slots)
    ms, tokens = classes.times[k, degree], classes.lengths[k]
    rows = Rows()
    for each in range(len(classes.lengths)):
        own = np.flatnonzero(k == each)
        if len(own) > 1:
            rows.add(own, np.ones(len(own)), classes.counts[each])
        if len(own) and classes.counts[each] == 1 and classes.lengths[each] > integer_above:
            rows.add([*own, duration], [*ms[own], -1.0], 0.0)
    for each in range(len(slots)):
        own = np.flatnonzero(degree == each)
        if not len(own):
            continue
        columns, capacity = [*own, first_y + each], problem.capacities[each]
        rows.add(columns, [*tokens[own], -capacity], 0.0)
        rows.add(columns, [*ms[own], -high], 0.0)
        for step in _STEPS:
            by_time, by_memory = _share(step, ms[own] / high), _share(step, tokens[own] / capacity)
            # With step 1 both are cliques of the longest, and the larger one implies the other.
            for share in (by_time, by_memory) if step > 1 else (np.maximum(by_time, by_memory),):
                large = share > 0
                if large.any():
                    rows.add([*own[large], first_y + each], [*share[large], -1.0], 0.0)
    rows.add(first_y + np.arange(len(slots)), slots, problem.num_slots)
    rows.add([*range(num), duration], [*(ms * slots[degree]), -float(problem.num_slots)], 0.0)
    return rows


def _share(step: int, part: Floats) -> Floats:
    """Shares that add up to at most 1 wherever ``part`` does. Rounding down only makes them smaller: still valid."""
    return np.maximum(np.floor((step + 1) * part - 1e-7), 0) / step


def _up(value: float) -> float:
    return value + _SAFETY * abs(value)
