"""Skyline branch and bound: do these buffers fit under a capacity? A complete search, so that a no is a proof.

Buffers are put down from the lowest address upwards. What has been placed shows from above as a skyline: one *floor* a
section, below which nothing more will be put. ``demand`` is what is still to be placed in a section::

    floor   . . 3 3 3 1 1 4 4       a *rests* at 3 (the highest of its floors), b at 1
                [--a--]
                      [b]           b's section is a local minimum: everything that rests there lies flat

*Tightening*: a section's floor rises to the lowest place at which any of its open buffers rests, for the room below is
lost to all. And what rests high must have others beneath: whatever cannot lie below a buffer, because its own top would
be too high, must find room above it together with all the rest of its kind. If there is none, the buffer's rest rises
to the next top at which enough of the others fit beneath::

      capacity 7 --------    open in one section: a (size 4, rests at 0) and b (size 3, rests at 1, on a floor
         |     [ b ]    |    elsewhere). Below b at 1, 2 or 3 there is no room for a, and on top of b it would
         |  [ a ]       |    reach 8. So b rests at 4, and what lives with it elsewhere learns of that.

If floor and demand exceed the capacity anywhere, the state is dead. Repeat until nothing changes.

*Branching*: take a local minimum. Either one of the buffers that rest there is its lowest (one branch each), or none of
them is, and the floor rises to the next place where a buffer of the section can come to lie: only if there is slack.
Every packing pushed down as far as it goes is found this way. Only at local minima is that so: a buffer that spans
lower sections would bury room in which others belong.

*Forgetting nothing*: when no open buffer crosses a moment, both sides are solved apart, and one failure is a failure.
Failed states (open buffers and their floors) are remembered across restarts. Twins are tried once.

*Restarts*: run times are heavy-tailed, so a round that has met its budget of nodes is dropped and another begins, with
a random order of buffers, a random rule for sections, and Luby's budgets (as many nodes as there are buffers, or 100,
times 1 1 2 1 1 2 4 ...), which end in one that is large enough.

``skyline.cpp`` is this search in C++, which redoes only what a placement has touched; this file is what runs where that
cannot be built.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .bounds import Sections

_BASE = 100
_SECTION_RULES = ("fewest", "lowest", "tightest", "noisy")
_MOST_FAILURES = 1 << 20


@dataclass(frozen=True, slots=True)
class Fit:
    """An answer: yes with offsets, no as a proof, or None, not known within the limits."""

    fits: bool | None
    offsets: tuple[int, ...]
    num_nodes: int
    num_restarts: int


def fit(cut: Sections, *, capacity: int, seed: int, max_nodes: int, max_seconds: float) -> Fit:
    """Whether the buffers of ``cut`` fit under ``capacity``."""
    search = _Search(cut, capacity, random.Random(seed), max_nodes, time.monotonic() + max_seconds)
    restarts = 0
    with _deep(8 * len(cut.size)):
        while True:
            search.begin_round(max(_BASE, 2 * len(cut.size)) * luby(restarts))
            try:
                fits = search.solve(0, cut.num_sections, list(range(len(cut.size))))
                return Fit(fits, tuple(search.offset) if fits else (), search.num_nodes, restarts)
            except (_BudgetMet, RecursionError):
                if search.num_nodes >= max_nodes or time.monotonic() > search.deadline:
                    return Fit(None, (), search.num_nodes, restarts)
            restarts += 1


@contextmanager
def _deep(frames: int) -> Iterator[None]:
    """So many calls more may be open at once: each buffer that is put down is a few."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def luby(index: int) -> int:
    """1 1 2 1 1 2 4 1 1 2 1 1 2 4 8 ..."""
    power = 1
    while index > 2 * power - 2:
        power *= 2
    return power if index == 2 * power - 2 else luby(index - power + 1)


class _BudgetMet(Exception):
    """The round, or the whole search, has used what it was given."""


@dataclass(slots=True)
class _Search:
    cut: Sections
    capacity: int
    random: random.Random
    max_nodes: int
    deadline: float
    lower: list[int] = field(init=False)
    upper: list[int] = field(init=False)
    size: list[int] = field(init=False)
    floor: list[int] = field(init=False)
    demand: list[int] = field(init=False)
    offset: list[int] = field(init=False)
    rest: list[int] = field(init=False)
    rank: list[float] = field(init=False)
    rule: str = field(init=False)
    budget: int = field(init=False)
    num_nodes: int = field(default=0, init=False)
    failures: set[tuple[object, ...]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.lower, self.upper = self.cut.lower.tolist(), self.cut.upper.tolist()
        self.size = self.cut.size.tolist()

    def begin_round(self, nodes: int) -> None:
        self.budget = self.num_nodes + nodes
        self.floor, self.demand = [0] * self.cut.num_sections, self.cut.load.tolist()
        self.offset, self.rest = [0] * len(self.size), [0] * len(self.size)
        self.rule = self.random.choice(_SECTION_RULES)
        area, length, sign = self.random.choice(((1, 1, 1), (1, 0, 1), (0, 1, 1), (1, 0, -1)))
        spread = self.random.choice((0.2, 1.0))
        self.rank = [
            sign * size**area * (upper - lower) ** length * (1 + spread * self.random.random())
            for lower, upper, size in zip(self.lower, self.upper, self.size, strict=True)
        ]

    def solve(self, begin: int, end: int, open_: list[int]) -> bool:
        """Place all of ``open_``, which live in [begin, end); floors are as before unless that succeeds."""
        if not open_:
            return True
        self.num_nodes += 1
        if self.num_nodes > min(self.budget, self.max_nodes) or (
            self.num_nodes % 16 == 0 and time.monotonic() > self.deadline
        ):
            raise _BudgetMet
        before = self.floor[begin:end]
        if self._tighten(begin, end, open_):
            state = (begin, end, tuple(open_), tuple(self.floor[begin:end]))
            if state not in self.failures:
                parts = self._split(open_)
                if self._solve_apart(parts) if len(parts) > 1 else self._branch(begin, end, open_):
                    return True
                if len(self.failures) < _MOST_FAILURES:
                    self.failures.add(state)
        self.floor[begin:end] = before
        return False

    def _tighten(self, begin: int, end: int, open_: Sequence[int]) -> bool:
        floor, demand, rest = self.floor, self.demand, self.rest
        columns: dict[int, list[int]] = {}
        for i in open_:
            rest[i] = max(floor[self.lower[i] : self.upper[i]])
            if rest[i] + self.size[i] > self.capacity:
                return False
            for t in range(self.lower[i], self.upper[i]):
                columns.setdefault(t, []).append(i)
        touched = dict.fromkeys(columns)
        while touched:
            t, _ = touched.popitem()
            floor[t] = max(floor[t], min(rest[i] for i in columns[t]))
            if floor[t] + demand[t] > self.capacity:
                return False
            for i in columns[t]:
                lowest = self._lowest_rest(i, t, columns[t])
                if lowest is None or lowest + self.size[i] > self.capacity:
                    return False
                if lowest > rest[i]:
                    rest[i] = lowest
                    touched.update(dict.fromkeys(range(self.lower[i], self.upper[i])))
        return True

    def _lowest_rest(self, i: int, t: int, column: Sequence[int]) -> int | None:
        """Where buffer ``i`` can lie at the lowest, so that what does not fit below it in section ``t`` fits above."""
        level, found = self.capacity - self.demand[t], self.rest[i]
        if found <= level:
            return found
        for top, size in sorted((self.rest[j] + self.size[j], self.size[j]) for j in column if j != i):
            if top > found:
                if found <= level:
                    break
                found = top
            level += size
        return found if found <= level else None

    def _split(self, open_: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = []
        reach = -1
        for i in sorted(open_, key=self.lower.__getitem__):
            if self.lower[i] >= reach:
                parts.append([])
            parts[-1].append(i)
            reach = max(reach, self.upper[i])
        return sorted(parts, key=len)

    def _solve_apart(self, parts: Sequence[list[int]]) -> bool:
        for index, part in enumerate(parts):
            begin, end = min(self.lower[i] for i in part), max(self.upper[i] for i in part)
            if not self.solve(begin, end, part):
                for i in (i for done in parts[:index] for i in done):
                    self._demand(i, self.size[i])
                return False
        return True

    def _branch(self, begin: int, end: int, open_: list[int]) -> bool:
        t, here = self._pick(begin, end, open_)
        floor, raised = self.floor[t], self._next_rest(t, here, open_)
        tight = self.floor[begin:end]
        tried = set()
        for i in sorted(here, key=self.rank.__getitem__, reverse=True):
            twin = (self.lower[i], self.upper[i], self.size[i])
            if twin in tried:
                continue
            tried.add(twin)
            self.offset[i] = floor
            self.floor[self.lower[i] : self.upper[i]] = [floor + self.size[i]] * (
                self.upper[i] - self.lower[i]
            )
            self._demand(i, -self.size[i])
            if self.solve(begin, end, [j for j in open_ if j != i]):
                return True
            self._demand(i, self.size[i])
            self.floor[begin:end] = tight
        if raised is None or raised + self.demand[t] > self.capacity:
            return False
        self.floor[t] = raised
        return self.solve(begin, end, open_)

    def _pick(self, begin: int, end: int, open_: Sequence[int]) -> tuple[int, list[int]]:
        here: dict[int, list[int]] = {}
        uneven = set()
        for i in open_:
            span = range(self.lower[i], self.upper[i])
            resting = [t for t in span if self.floor[t] == self.rest[i]]
            if len(resting) < len(span):
                uneven.update(resting)
            for t in resting:
                here.setdefault(t, []).append(i)
        best = min((t for t in here if t not in uneven), key=lambda t: self._judge(t, len(here[t])))
        return best, here[best]

    def _judge(self, t: int, count: int) -> float:
        slack = self.capacity - self.floor[t] - self.demand[t]
        if self.rule == "lowest":
            return self.floor[t] * 1e6 / self.capacity + count
        if self.rule == "tightest":
            return slack * 1e3 / self.capacity + count
        noise = self.random.random() if self.rule == "noisy" else 1e-3 * slack / self.capacity
        return count + (1.5 if slack else 0.0) + noise

    def _next_rest(self, t: int, here: Sequence[int], open_: Sequence[int]) -> int | None:
        """The lowest place above its floor at which a buffer of section ``t`` can come to lie."""
        lower, upper = self.lower, self.upper
        higher = [
            self.rest[j] for j in open_ if lower[j] <= t < upper[j] and self.rest[j] > self.floor[t]
        ] + [
            self.rest[j] + self.size[j]
            for j in open_
            if any(i != j and lower[i] < upper[j] and lower[j] < upper[i] for i in here)
        ]
        return min(higher, default=None)

    def _demand(self, i: int, change: int) -> None:
        for t in range(self.lower[i], self.upper[i]):
            self.demand[t] += change


def first_fit(cut: Sections, order: NDArray[np.int32], *, best: bool) -> tuple[int, NDArray[np.int64]]:
    """Peak and offsets when buffers go down in ``order``, each into the first gap or into the smallest."""
    num = len(order)
    offset, top = np.zeros(num, np.int64), np.zeros(num, np.int64)
    placed = np.zeros(num, bool)
    for i in order.tolist():
        size = int(cut.size[i])
        met = np.flatnonzero(placed & (cut.lower < cut.upper[i]) & (cut.upper > cut.lower[i]))
        met = met[np.argsort(offset[met], kind="stable")]
        roofs = np.concatenate(([0], np.maximum.accumulate(top[met])))
        gaps = offset[met] - roofs[:-1]
        wide = np.flatnonzero(gaps >= size)
        chosen = -1 if not len(wide) else wide[np.argmin(gaps[wide])] if best else wide[0]
        offset[i], placed[i] = roofs[chosen], True
        top[i] = offset[i] + size
    return int(top.max(initial=0)), offset
