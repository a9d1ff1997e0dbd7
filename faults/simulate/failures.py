"""When which node fails: a failure process, drawn at once as arrays.

A process is a rate, a shape and a mix. *Burstiness* is the coefficient of variation of the time between failures: gaps
are gamma distributed, which at 1 is Poisson; a cluster of 400 nodes over 348 days had 1.76 (InfiniteHBD, SIGCOMM 2025).
*Frailty* makes repeat offenders: the hazards of the nodes are gamma distributed with mean 1 and this variance.
*Correlated* is the share of lost nodes that take their whole rack along. The mean rate stays what it is in each case.

Drawing does not depend on what the job does, so all policies meet the same failures and can be compared pairwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

DAY_S = 86_400.0


class Shows(StrEnum):
    """How a failure becomes known, which decides how long it takes."""

    CRASH = "crash"
    """a process ends, and everybody notices"""
    HANG = "hang"
    """everything stands still until somebody notices"""
    CORRUPTION = "corruption"
    """training goes on, and everything since the onset is worthless"""
    PLANNED = "planned"
    """announced: a save precedes it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureClass:
    """One line of a mix."""

    name: str
    per_1000_node_days: float
    node_share: float = 0.0
    """probability that the node is lost, with what its memory holds, and has to be repaired"""
    shows: Shows = Shows.CRASH


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureProcess:
    """What is drawn from."""

    classes: tuple[FailureClass, ...]
    burstiness: float = 1.0
    """standard deviation of the time between failures over its mean"""
    frailty: float = 0.0
    """variance of the nodes' hazards, whose mean is 1"""
    correlated: float = 0.0
    """share of lost nodes that take their rack along"""
    rack_nodes: int = 8
    repair_median_s: float = 0.85 * DAY_S
    repair_sigma: float = 2.13
    """standard deviation of the logarithm of the repair time; with the median, those of InfiniteHBD (p90 13 days)"""

    @property
    def per_node_s(self) -> float:
        """Failures a node and second."""
        return sum(each.per_1000_node_days for each in self.classes) / 1000 / DAY_S


@dataclass(frozen=True, slots=True, eq=False)
class Failures:
    """Failures in order of time, a row each."""

    classes: tuple[FailureClass, ...]
    t_s: NDArray[np.float64]
    node: NDArray[np.int64]
    kind: NDArray[np.int64]
    """index into ``classes``"""
    repair_s: NDArray[np.float64]
    """how long the node is away; 0 if it stays"""

    def __len__(self) -> int:
        return len(self.t_s)


def draw(process: FailureProcess, *, num_nodes: int, horizon_s: float, seed: int) -> Failures:
    """The failures of ``num_nodes`` nodes until ``horizon_s``; the same for the same seed."""
    rng = np.random.default_rng(seed)
    t_s = _arrivals(rng, process.per_node_s * num_nodes, process.burstiness, horizon_s)
    node = _pick(rng, _hazards(rng, num_nodes, process.frailty), len(t_s))
    kind = _pick(rng, [each.per_1000_node_days for each in process.classes], len(t_s))
    node_share = np.array([each.node_share for each in process.classes])
    lost = rng.random(len(t_s)) < node_share[kind]
    first = np.flatnonzero(lost & (rng.random(len(t_s)) < process.correlated))
    others = [(row, other) for row in first for other in _rack_mates(process, num_nodes, int(node[row]))]
    rows = np.concatenate([np.arange(len(t_s)), np.array([row for row, _ in others], dtype=np.int64)])
    nodes = np.concatenate([node, np.array([other for _, other in others], dtype=np.int64)])
    repair_s = process.repair_median_s * np.exp(process.repair_sigma * rng.standard_normal(len(rows)))
    order = np.argsort(t_s[rows], kind="stable")
    rows = rows[order]
    return Failures(
        process.classes, t_s[rows], nodes[order], kind[rows], np.where(lost[rows], repair_s[order], 0.0)
    )


def _arrivals(
    rng: np.random.Generator, rate: float, burstiness: float, horizon_s: float
) -> NDArray[np.float64]:
    """Times of a renewal process; it begins long before 0, since bursts would gather at its beginning."""
    if rate == 0:
        return np.empty(0)
    shape = burstiness**-2
    now = -20 * (1 + burstiness**2) / rate
    parts: list[NDArray[np.float64]] = []
    while now < horizon_s:
        num = int((horizon_s - now) * rate * 1.1) + 10
        times = now + np.cumsum(rng.gamma(shape, 1 / (shape * rate), num))
        now = float(times[-1])
        parts.append(times)
    times = np.concatenate(parts)
    return times[(0 <= times) & (times < horizon_s)]


def _hazards(rng: np.random.Generator, num_nodes: int, frailty: float) -> NDArray[np.float64]:
    return rng.gamma(1 / frailty, frailty, num_nodes) if frailty else np.ones(num_nodes)


def _pick(
    rng: np.random.Generator, weights: Sequence[float] | NDArray[np.float64], num: int
) -> NDArray[np.int64]:
    """``num`` indices in proportion to ``weights``."""
    sums = np.cumsum(weights)
    drawn = np.searchsorted(sums, rng.random(num) * sums[-1], side="right")
    return np.asarray(drawn, dtype=np.int64)


def _rack_mates(process: FailureProcess, num_nodes: int, node: int) -> list[int]:
    begin = node - node % process.rack_nodes
    return [other for other in range(begin, min(begin + process.rack_nodes, num_nodes)) if other != node]
