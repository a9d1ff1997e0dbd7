"""Lengths and plans for the benchmark of sequence groups: what is trained, in which groups, and what is timed first."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from distrain.planners.sequence import native
from distrain.planners.sequence.cost import SequenceCost
from distrain.planners.sequence.plan import assemble, plan_step
from distrain.planners.sequence.problem import StepProblem
from distrain.planners.sequence.step_plan import MicroBatch, SequenceGroup, StepPlan, step_ms

PLANNING_MS = 200.0
"""for every plan, so that all are as good as the planner can make them"""


def long_tailed(num: int, *, longest: int, seed: int = 3) -> list[int]:
    """Log-normal lengths, as documents have them, scaled so that the longest is as long as said."""
    drawn = np.random.default_rng(seed).lognormal(0.0, 1.4, num)
    return [max(1, round(length)) for length in drawn / drawn.max() * longest]


def degrees_of(num_slots: int) -> list[int]:
    """Powers of two up to the number of devices."""
    return [2**i for i in range(num_slots.bit_length())]


def adaptive_plan(lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> StepPlan:
    """Groups as the planner likes."""
    return plan_step(lengths, num_slots=num_slots, cost=cost, time_limit_s=PLANNING_MS / 1e3)


def static_plans(lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> dict[int, StepPlan]:
    """For each degree at which the longest fits, the best plan that the planner finds with no other degree."""
    problem, found = StepProblem.of(lengths, num_slots=num_slots, cost=cost), {}
    for degree in degrees_of(num_slots):
        if max(lengths) <= cost.capacity(degree):
            only = replace(problem, degrees=(degree,))
            waves = native.search(only, milliseconds=PLANNING_MS, seed=0, build=True)
            if waves is not None:
                found[degree] = _plan(assemble(only, waves), num_slots)
    return found


def samples(degree: int, *, tokens_per_gpu: int) -> list[list[int]]:
    """Lengths of groups to be timed: full and half full, of one sequence, of some equal ones, and of documents."""
    chosen = []
    for tokens in (degree * tokens_per_gpu, degree * tokens_per_gpu // 2):
        chosen += [[tokens], [tokens // 4] * 4, [tokens // 20] * 20]
        documents = long_tailed(60, longest=tokens // 2, seed=degree)
        while sum(documents) > tokens:
            documents.pop()
        chosen.append(documents)
    return chosen


def uniform(lengths: Sequence[int], degree: int, *, num_slots: int) -> StepPlan:
    """A micro-batch in which every group of ``degree`` computes sequences of these ``lengths``.

    Sequences are numbered group by group: the step's lengths are ``lengths`` repeated once a group.
    """
    num = len(lengths)
    groups = (
        SequenceGroup(
            tuple(range(group * degree, (group + 1) * degree)),
            tuple(range(group * num, (group + 1) * num)),
            0.0,
        )
        for group in range(num_slots // degree)
    )
    return _plan((tuple(groups),), num_slots)


def _plan(microbatches: tuple[MicroBatch, ...], num_slots: int) -> StepPlan:
    return StepPlan(
        microbatches=microbatches,
        num_slots=num_slots,
        estimated_ms=step_ms(microbatches, num_slots=num_slots, schedule="lock-step"),
        lower_bound_ms=0.0,
        gap=1.0,
        status="feasible",
        seconds=0.0,
    )


def shown(plan: StepPlan) -> str:
    """Degrees of the groups of each micro-batch: 8 | 2x2 1x4 | 1x8."""
    return " | ".join(map(degrees_shown, plan.microbatches))


def degrees_shown(groups: MicroBatch) -> str:
    """Degrees of the groups of one micro-batch: 2x2 1x4."""
    degrees = [group.degree for group in groups]
    counts = {degree: degrees.count(degree) for degree in degrees}
    return " ".join(f"{degree}x{count}" if count > 1 else str(degree) for degree, count in counts.items())
