"""An independent look at a plan: memory, times and bound are computed again from the lengths and the cost model.

It shares nothing with the planners but the cost model, so it can convict them.
"""

from collections.abc import Iterator, Sequence
from math import isclose

from distrain.core.errors import Problem

from .cost import SequenceCost
from .step_plan import SequenceGroup, StepPlan, step_ms

_TOLERANCE = 1e-6  # sums in another order, and a JSON file in between


def check_plan(plan: StepPlan, lengths: Sequence[int], cost: SequenceCost) -> list[Problem]:
    """Everything that is wrong with ``plan`` for ``lengths`` under ``cost``; empty if it is as it says."""
    problems = plan.check(lengths)
    if problems:
        return problems
    degrees = cost.degrees(plan.num_slots)
    for index, groups in enumerate(plan.microbatches):
        for group in groups:
            problems += _group(
                f"micro-batch {index}, ranks from {group.ranks[0]}", group, lengths, cost, degrees
            )
    problems += _totals(plan)
    return problems


def _group(
    where: str, group: SequenceGroup, lengths: Sequence[int], cost: SequenceCost, degrees: Sequence[int]
) -> Iterator[Problem]:
    degree = group.degree
    if degree not in degrees:
        yield Problem("a group has a degree of no known bandwidth", f"{where}: {degree}", f"{list(degrees)}")
        return
    own = [lengths[sequence] for sequence in group.sequences]
    if sum(own) > cost.capacity(degree):
        got = f"{where}: {sum(own)} tokens"
        yield Problem(
            "a group does not fit its memory", got, f"{cost.capacity(degree)} tokens at degree {degree}"
        )
    expected = cost.group_ms(own, degree)
    if not isclose(group.estimated_ms, expected, rel_tol=_TOLERANCE):
        yield Problem(
            "a group's time is not what its sequences take", f"{where}: {group.estimated_ms}", f"{expected}"
        )


def _totals(plan: StepPlan) -> Iterator[Problem]:
    expected = step_ms(plan.microbatches, num_slots=plan.num_slots, schedule=plan.schedule)
    if not isclose(plan.estimated_ms, expected, rel_tol=_TOLERANCE):
        yield Problem("the step's time is not what its groups take", f"{plan.estimated_ms}", f"{expected}")
    if plan.lower_bound_ms > plan.estimated_ms * (1 + _TOLERANCE):
        yield Problem(
            "the bound is above the plan it bounds", f"{plan.lower_bound_ms}", f"at most {plan.estimated_ms}"
        )
