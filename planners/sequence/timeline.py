"""A step without barriers: every group starts as soon as its own slots are free.

Where nothing but the group itself has to meet for a pass (replicas, or shards within a node), short groups need not
wait for long ones. A pass is what a micro-batch's group is in lock-step: sequences that fit a group's memory together,
with the fixed cost beta1. Passes are made for a target duration and laid out widest and longest first, each on the
block of slots that is free first::

    slots 0-3  [      degree 4      ][ 2 ][1][1]
                                     [ 2 ][1][ 1]

Several targets are tried, and the plan in lock-step with its barriers taken out. The plan's micro-batches are then the
order of passes on each slot: the n-th micro-batch holds passes that come n-th or later on all of their slots.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

from .problem import StepProblem
from .step_plan import MicroBatch, SequenceGroup, step_ms

_PARTS = (2, 3, 1, 4, 5, 6, 8, 10, 12, 16, 20, 24)  # of a step, that a pass is meant to take
_TRIES = 64  # passes looked at for one sequence
_S_PER_SEQUENCE = 1e-5  # of one such plan


@dataclass(slots=True)
class _Pass:
    degree: int
    """index into the problem's degrees"""
    ms: float
    tokens: float = 0.0
    members: list[int] = field(default_factory=list)


def asynchronous(
    problem: StepProblem, lock_step: Sequence[MicroBatch], *, seconds: float
) -> tuple[MicroBatch, ...]:
    """The shortest of some plans: ``lock_step`` without its barriers, at least two more, others as ``seconds`` allow.

    How many is reckoned, not timed: the same plan on every machine.
    """
    num = max(2, int(seconds / _S_PER_SEQUENCE / len(problem.lengths)))
    bound_ms = asynchronous_bound_ms(problem)
    plans = [tuple(lock_step)]
    for parts in _PARTS[:num]:
        passes = _passes(problem, bound_ms / parts)
        plans.append(_levels(problem, list(_placed(problem, passes))))
    return min(plans, key=lambda plan: step_ms(plan, num_slots=problem.num_slots, schedule="asynchronous"))


def asynchronous_bound_ms(problem: StepProblem) -> float:
    """No plan is faster: slots times ms spread evenly, beta1 for the memory the tokens need; the longest sequence."""
    cost = problem.cost
    blocks = math.ceil(float(problem.lengths.sum()) / cost.tokens_per_gpu - 1e-9)
    spread_ms = (float(problem.areas.sum()) + cost.beta1 * max(blocks, 1)) / problem.num_slots
    fits = problem.lengths[0] <= problem.capacities
    return max(spread_ms, float(problem.times[0][fits].min()) + cost.beta1)


def _passes(problem: StepProblem, target_ms: float) -> list[_Pass]:
    """Passes of at most ``target_ms`` where the sequences allow it, by descending best-fit in tokens."""
    passes: list[_Pass] = []
    capacities = problem.capacities.tolist()
    opened: list[list[tuple[float, int]]] = [[] for _ in capacities]  # (tokens left, pass), ascending
    room_ms = max(target_ms - problem.cost.beta1, 0.0)
    for member, (length, times) in enumerate(
        zip(problem.lengths.tolist(), problem.times.tolist(), strict=True)
    ):
        allowed = range(bisect_left(capacities, length), len(capacities))
        degree = next((each for each in allowed if times[each] <= room_ms), None)
        if degree is None:
            degree = min(allowed, key=lambda each: times[each])
        fits = opened[degree]
        first = bisect_left(fits, (length, -1))
        found = next(
            (
                at
                for at in range(first, min(first + _TRIES, len(fits)))
                if passes[fits[at][1]].ms + times[degree] <= target_ms
            ),
            None,
        )
        if found is None:
            number = len(passes)
            passes.append(_Pass(degree, problem.cost.beta1))
        else:
            number = fits.pop(found)[1]
        one = passes[number]
        one.ms += times[degree]
        one.tokens += length
        one.members.append(member)
        insort(fits, (capacities[degree] - one.tokens, number))
    return passes


def _placed(problem: StepProblem, passes: list[_Pass]) -> Iterator[tuple[float, int, _Pass]]:
    """Start, first slot and pass: widest first, then longest first, each where it can start first."""
    free_ms = [0.0] * problem.num_slots
    by_degree: dict[int, list[_Pass]] = {}
    for one in passes:
        by_degree.setdefault(one.degree, []).append(one)
    for index in sorted(by_degree, reverse=True):
        degree = problem.degrees[index]
        blocks = [
            (max(free_ms[first : first + degree]), first)
            for first in range(0, problem.num_slots - degree + 1, degree)
        ]
        heapify(blocks)
        for one in sorted(by_degree[index], key=lambda one: (-one.ms, one.members[0])):
            start_ms, first = blocks[0]
            heapreplace(blocks, (start_ms + one.ms, first))
            free_ms[first : first + degree] = [start_ms + one.ms] * degree
            yield start_ms, first, one


def _levels(problem: StepProblem, placed: list[tuple[float, int, _Pass]]) -> tuple[MicroBatch, ...]:
    """Passes as micro-batches that keep the order of passes on every slot."""
    level = [0] * problem.num_slots
    batches: list[list[SequenceGroup]] = []
    for _, first, one in sorted(placed, key=lambda each: each[:2]):
        degree = problem.degrees[one.degree]
        own = max(level[first : first + degree])
        level[first : first + degree] = [own + 1] * degree
        if own == len(batches):
            batches.append([])
        members = sorted(problem.order[one.members].tolist())
        batches[own].append(SequenceGroup(tuple(range(first, first + degree)), tuple(members), one.ms))
    return tuple(tuple(sorted(groups, key=lambda group: group.ranks)) for groups in batches)
