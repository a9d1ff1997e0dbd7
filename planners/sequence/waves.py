"""The planner where nothing can be compiled: the same waves as ``waves.cpp`` packs, without the search.

Sequences are taken from the longest down. A wave of a target duration gives each the least degree at which it meets
the target, in the open group with the least time left, in a new group, or leaves it to a later wave. Some targets are
tried, and the waves of one degree, of which the best is kept.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .native import Waves
from .problem import StepProblem

_TARGETS = (1.1, 0.8, 1.6, 0.6, 2.2, 1.4, 0.9)  # of the mean duration of a wave
_BUILD_MS_PER_SEQUENCE = 0.03
_STEPS = 10  # of a bisection
_CAPS = (1.1, 1.35, 1.6, 1.2)  # of the mean duration of a wave of one degree
_CHUNKINGS = 3  # into numbers of waves from the least on
_TRIES = 24  # groups looked at for one sequence


@dataclass(slots=True)
class Wave:
    """Groups while they are filled; members and their groups, in step."""

    members: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)
    """of each group"""
    ms: float = 0.0


def search(problem: StepProblem, *, milliseconds: float) -> Waves:
    """The best of a few plans: at least two, and as many more as a processor of the last years makes in the time."""
    packer = Packer(problem)
    static_ms, adaptive = packer.homogeneous()
    num = max(2, int(milliseconds / _BUILD_MS_PER_SEQUENCE / len(problem.lengths)))
    plans = [adaptive, *(packer.build(target * packer.mean_ms) for target in _TARGETS[:num])]
    best = min(plans, key=packer.total)
    return packer.placed(best, static_ms=static_ms, adaptive=adaptive)


class Packer:
    """Packs the sequences of one problem into waves."""

    def __init__(self, problem: StepProblem) -> None:
        self.num_slots, self.degrees = problem.num_slots, problem.degrees
        self.beta1 = problem.cost.beta1
        self.lengths: list[float] = problem.lengths.tolist()
        self.times: list[list[float]] = problem.times.tolist()
        self.capacities: list[float] = problem.capacities.tolist()
        self.areas: list[float] = problem.areas.tolist()
        self.least = [bisect_left(self.capacities, length) for length in self.lengths]
        self.num_waves = problem.least_waves
        self.mean_ms = sum(self.areas) / self.num_slots / self.num_waves

    def total(self, waves: list[Wave]) -> float:
        """Of the step."""
        return sum(wave.ms + self.beta1 for wave in waves)

    def placed(self, waves: list[Wave], *, static_ms: float, adaptive: list[Wave]) -> Waves:
        """``waves`` as the arrays that other planners return."""
        wave, group, degree = (np.empty(len(self.lengths), np.int32) for _ in range(3))
        for index, one in enumerate(waves):
            wave[one.members] = index
            group[one.members] = one.groups
            degree[one.members] = [one.degrees[of] for of in one.groups]
        return Waves(wave, group, degree, static_ms, self.total(adaptive))

    def pack(
        self, members: list[int], cap_ms: float, *, only: int | None = None, rest: list[int] | None = None
    ) -> Wave | None:
        """A wave of ``members`` under ``cap_ms``; what does not fit goes to ``rest``, or there is no wave."""
        wave, used, slots = Wave(), [], 0
        opened: list[list[tuple[float, int]]] = [[] for _ in self.degrees]  # (ms left, group), ascending
        left: list[float] = []  # tokens of each group
        for member in members:
            found = None
            for degree in self._choices(member, cap_ms, only):
                ms, tokens = self.times[member][degree], self.lengths[member]
                group = _take(opened[degree], ms, tokens, left)
                if group is None and slots + self.degrees[degree] <= self.num_slots:
                    slots += self.degrees[degree]
                    group = len(left)
                    wave.degrees.append(degree)
                    left.append(self.capacities[degree])
                    used.append(0.0)
                if group is not None:
                    found = group
                    break
            if found is None:
                if rest is None:
                    return None
                rest.append(member)
                continue
            used[found] += ms
            left[found] -= tokens
            insort(opened[degree], (cap_ms - used[found], found))
            wave.members.append(member)
            wave.groups.append(found)
        wave.ms = max(used, default=0.0)
        return wave

    def _choices(self, member: int, cap_ms: float, only: int | None) -> list[int]:
        """Degrees at which the sequence fits, narrowest first."""
        allowed = range(self.least[member], len(self.degrees)) if only is None else [only]
        times = self.times[member]
        return [i for i in allowed if i >= self.least[member] and times[i] <= cap_ms * (1 + 1e-12)]

    def shortest(self, members: list[int], *, only: int | None = None) -> Wave | None:
        """The shortest wave of all ``members`` that bisection finds."""
        times = [self.times[member] for member in members]
        if only is None:
            low = max(sum(self.areas[member] for member in members) / self.num_slots, min(times[0]))
            high = sum(map(max, times))
        else:
            column = [row[only] for row in times]
            low = max(sum(column) / (self.num_slots // self.degrees[only]), max(column))
            high = sum(column)
        best = self.pack(members, high * (1 + 1e-9), only=only)  # sums in another order
        if best is None:
            return None
        low = min(low, best.ms)
        for _ in range(_STEPS):
            middle = math.sqrt(low * best.ms) if low > 0 else best.ms / 2
            wave = self.pack(members, middle, only=only)
            if wave is None:
                low = middle
            else:
                best = wave
        return best

    def build(self, target_ms: float, *, only: int | None = None) -> list[Wave]:
        """Waves of about ``target_ms``, the longest sequences first; ``only`` restricts them to one degree."""
        pool, waves = list(range(len(self.lengths))), []
        while pool:
            times = self.times[pool[0]]
            first = times[self.least[pool[0]] :] if only is None else [times[only]]
            cap_ms = max(target_ms, min(first))
            rest: list[int] = []
            wave = self.pack(pool, cap_ms, only=only, rest=rest)
            if wave is None or not wave.members:
                raise AssertionError("a wave takes at least its longest sequence")
            last = None if rest else self.shortest(pool, only=only)
            waves.append(last if last is not None and last.ms < wave.ms else wave)
            pool = rest
        return waves

    def homogeneous(self) -> tuple[float, list[Wave]]:
        """Best ms with one degree for all waves, and the waves of the best plan with one degree a wave."""
        fixed = min((self._fixed(only) for only in range(self.least[0], len(self.degrees))), key=self.total)
        best = [self._narrowed(wave) for wave in fixed]
        for chunks in islice(self._chunkings(), _CHUNKINGS):
            waves: list[Wave] = []
            for members in chunks:
                found = [self.shortest(members, only=only) for only in range(len(self.degrees))]
                fitting = [wave for wave in found if wave is not None]
                if not fitting:
                    break
                waves.append(min(fitting, key=lambda wave: wave.ms))
            if len(waves) == len(chunks):
                best = min(best, waves, key=self.total)
        return self.total(fixed), best

    def _fixed(self, only: int) -> list[Wave]:
        """The best of some plans with one degree for all waves."""
        num_groups = self.num_slots // self.degrees[only]
        spread_ms = sum(row[only] for row in self.times) / num_groups
        least = max(1, math.ceil(sum(self.lengths) / (num_groups * self.capacities[only])))
        return min((self.build(cap * spread_ms / least, only=only) for cap in _CAPS), key=self.total)

    def _narrowed(self, wave: Wave) -> Wave:
        """The wave with groups of the one degree that suits it best."""
        members = sorted(wave.members)
        found = [self.shortest(members, only=only) for only in range(len(self.degrees))]
        return min([wave, *(each for each in found if each is not None)], key=lambda each: each.ms)

    def _chunkings(self) -> Iterator[list[list[int]]]:
        """Contiguous parts of about equal tokens, in more and more parts until every sequence has its own."""
        tokens, num = sum(self.lengths), self.num_waves
        while True:
            chunks: list[list[int]] = [[]]
            filled, most = 0.0, max(self.lengths[0], tokens / num)
            for member, length in enumerate(self.lengths):
                if chunks[-1] and filled + length > most:
                    chunks.append([])
                    filled = 0.0
                chunks[-1].append(member)
                filled += length
            yield chunks
            num += max(1, num // 4)


def _take(opened: list[tuple[float, int]], ms: float, tokens: float, left: list[float]) -> int | None:
    """The group with the least time left that holds the sequence, taken out of ``opened``."""
    start = bisect_left(opened, (ms, -1))
    for at in range(start, min(start + _TRIES, len(opened))):
        group = opened[at][1]
        if tokens <= left[group]:
            opened.pop(at)
            return group
    return None
