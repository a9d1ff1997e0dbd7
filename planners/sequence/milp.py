"""FlexSP's own planner (arXiv 2412.01523, section 4): micro-batches by tokens, then a program for each.

*Blaster.* Sequences are sorted by length and cut into m contiguous micro-batches of about equal tokens, for the least m
that memory allows and some more; the best m wins.

*Program.* For each degree d there are N / d groups that may be used (m_p) or not; A_kp sequences of bucket k go to
group p, and the longest group counts::

    min M    sum_p A_kp = size_k                     sum_k L_k A_kp <= d_p E m_p
             sum_k t(L_k, d_p) A_kp <= M             sum_p d_p m_p <= N

Groups of one degree are interchangeable, so they are used in order and filled by descending time. The best-fit wave of
the Python planner is where the search starts. The paper's program has degrees from 2 on; here the least is a choice.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pulp

from distrain.core.errors import InfeasibleError, UndecidedError
from distrain.planners.solve import Solution, Solver, solve

from .buckets import enough_buckets
from .native import Waves
from .problem import StepProblem
from .waves import Packer, Wave

_MORE_CHUNKS = 4


def search(
    problem: StepProblem, *, seconds: float, least_degree: int = 1, solver: Solver = "highs"
) -> tuple[Waves, list[str]]:
    """The best plan of the programs for m0 to m0 + 4 micro-batches, solved one after the other within ``seconds``.

    Or the best plan of one degree a micro-batch, if that is better; with sentences that say how it went.
    """
    deadline = time.monotonic() + seconds
    packer = Packer(problem)
    static_ms, adaptive = packer.homogeneous()
    best, reasons = adaptive, ["no program beat the best plan of one degree a micro-batch"]
    numbers = range(problem.least_waves, problem.least_waves + _MORE_CHUNKS + 1)
    chunkings = [chunks for num in numbers if (chunks := blaster(problem, num))]
    for at, chunks in enumerate(chunkings):
        if at and time.monotonic() >= deadline:
            break
        waves, proven = [], 0
        for index, members in enumerate(chunks):
            left_s = max(0.0, deadline - time.monotonic()) / (len(chunkings) - at) / (len(chunks) - index)
            try:
                one, found = wave(problem, members, seconds=left_s, least_degree=least_degree, solver=solver)
            except (UndecidedError, InfeasibleError):
                break
            waves.append(one)
            proven += found.status == "optimal"
        if len(waves) == len(chunks) and packer.total(waves) < packer.total(best):
            best = waves
            reasons = [f"{len(chunks)} programs, of which {proven} were solved to their optimum"]
    return packer.placed(best, static_ms=static_ms, adaptive=adaptive), reasons


def blaster(problem: StepProblem, num: int) -> list[list[int]]:
    """Contiguous micro-batches of descending length with the least largest token sum; none if memory forbids it."""
    tokens = problem.lengths.tolist()

    def cut(most: float) -> list[list[int]]:
        chunks: list[list[int]] = [[]]
        filled = 0.0
        for member, length in enumerate(tokens):
            if filled + length > most and chunks[-1]:
                chunks.append([])
                filled = 0.0
            chunks[-1].append(member)
            filled += length
        return chunks

    low, high = max(tokens[0], math.ceil(sum(tokens) / num)), sum(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= num:
            high = middle
        else:
            low = middle + 1
    memory = problem.num_slots * problem.cost.tokens_per_gpu
    return cut(high) if high <= memory else []


def wave(
    problem: StepProblem,
    members: Sequence[int],
    *,
    seconds: float,
    least_degree: int = 1,
    exact: bool = False,
    solver: Solver = "highs",
) -> tuple[Wave, Solution]:
    """The best wave of ``members`` that the program finds, and what the solver proved of the program.

    With ``exact`` every sequence is a bucket of its own.

    Raises:
        InfeasibleError: the members do not fit one micro-batch.
        UndecidedError: no wave was found in time.
    """
    lengths = [float(problem.lengths[member]) for member in members]
    memory = float(problem.num_slots * problem.cost.tokens_per_gpu)
    parts = [[each] for each in range(len(lengths))] if exact else enough_buckets(lengths, memory)
    program = _Program(problem, lengths, parts, least_degree)
    found = solve(program.program, time_limit_s=seconds, solver=solver, warm_start=program.start())
    return program.wave(members), found


class _Program:
    def __init__(
        self, problem: StepProblem, lengths: list[float], parts: list[list[int]], least_degree: int
    ) -> None:
        self.problem, self.parts = problem, parts
        self.tops = tops = np.array([max(lengths[each] for each in part) for part in parts])
        self.groups = [
            index
            for index, degree in enumerate(problem.degrees)
            if degree >= min(least_degree, problem.degrees[-1])
            for _ in range(min(problem.num_slots // degree, len(lengths)))
        ]
        self.program = program = pulp.LpProblem("flexsp", pulp.LpMinimize)
        self.longest = program.add_variable("M", 0)
        self.used = [program.add_variable(f"m_{p}", 0, 1, cat="Integer") for p in range(len(self.groups))]
        self.counts = {
            (k, p): program.add_variable(f"A_{k}_{p}", 0, len(part), cat="Integer")
            for k, part in enumerate(parts)
            for p, index in enumerate(self.groups)
            if tops[k] <= problem.capacities[index]
        }
        times = [problem.cost.sequence_ms(tops, degree) for degree in problem.degrees]
        program += self.longest
        for k, part in enumerate(parts):
            program += pulp.lpSum(
                self.counts[k, p] for p in range(len(self.groups)) if (k, p) in self.counts
            ) == len(part)
        busy = []
        for p, index in enumerate(self.groups):
            own = [k for k in range(len(parts)) if (k, p) in self.counts]
            tokens = pulp.lpSum(float(tops[k]) * self.counts[k, p] for k in own)
            program += tokens <= float(problem.capacities[index]) * self.used[p]
            busy.append(pulp.lpSum(float(times[index][k]) * self.counts[k, p] for k in own))
            program += busy[p] <= self.longest
        for p in range(1, len(self.groups)):
            if self.groups[p] == self.groups[p - 1]:
                program += self.used[p] <= self.used[p - 1]
                program += busy[p] <= busy[p - 1]
        degrees = problem.degrees
        program += pulp.lpSum(
            degrees[index] * used for index, used in zip(self.groups, self.used, strict=True)
        ) <= (problem.num_slots)
        self.times = times

    def start(self) -> bool:
        """Begin at a best-fit wave of the lengths that the program counts with; False if none was found."""
        counted = [int(self.tops[k]) for k, part in enumerate(self.parts) for _ in part]
        bucket = [k for k, part in enumerate(self.parts) for _ in part]
        packed = StepProblem.of(counted, num_slots=self.problem.num_slots, cost=self.problem.cost)
        packer, members = Packer(packed), list(range(len(counted)))
        widths = [index for index in set(self.groups) if packed.lengths[0] <= packed.capacities[index]]
        found = [wave for only in (None, *widths) if (wave := packer.shortest(members, only=only))]
        usable = [wave for wave in found if set(wave.degrees) <= set(self.groups)]
        if not usable:
            return False
        best = min(usable, key=lambda wave: wave.ms)
        self._begin(best, [bucket[each] for each in packed.order[best.members]])
        return True

    def _begin(self, warm: Wave, ks: list[int]) -> None:
        filled: dict[int, list[int]] = {}
        for k, group in zip(ks, warm.groups, strict=True):
            filled.setdefault(group, []).append(k)
        busy = {
            group: sum(float(self.times[warm.degrees[group]][k]) for k in own)
            for group, own in filled.items()
        }
        free = {
            index: [p for p, other in enumerate(self.groups) if other == index] for index in set(self.groups)
        }
        for variable in self.program.variables():
            variable.setInitialValue(0)
        for group in sorted(filled, key=lambda group: -busy[group]):
            p = free[warm.degrees[group]].pop(0)
            self.used[p].setInitialValue(1)
            for k, count in Counter(filled[group]).items():
                self.counts[k, p].setInitialValue(count)
        self.longest.setInitialValue(max(busy.values()))

    def wave(self, members: Sequence[int]) -> Wave:
        """The sequences themselves in the groups of the solution, and the duration that they take."""
        found = Wave()
        left = [list(part) for part in self.parts]
        for p, index in enumerate(self.groups):
            chosen = [
                members[left[k].pop()]
                for k in range(len(left))
                if (k, p) in self.counts
                for _ in range(round(self.counts[k, p].value()))
            ]
            if chosen:
                found.groups += [len(found.degrees)] * len(chosen)
                found.degrees.append(index)
                found.members += chosen
                found.ms = max(found.ms, sum(float(self.problem.times[member, index]) for member in chosen))
        return found
