"""Plans of one degree for all groups: what a user asks for, and what is done when no better plan is at hand.

``dealt`` needs no cost model: the degree and the number of micro-batches are given, similar lengths share a
micro-batch, and within it the groups get about as many tokens each. ``homogeneous`` tries every degree of a cost
model in this way, with as few micro-batches as memory allows, and takes the fastest. Both take milliseconds, use
nothing of the search for better plans, and so work when that has failed.
"""

import heapq
import math
from collections.abc import Sequence

from distrain.core.errors import InfeasibleError

from .cost import SequenceCost
from .step_plan import MicroBatch, SequenceGroup, StepPlan, step_ms


def dealt(lengths: Sequence[int], *, num_slots: int, degree: int, num_micro_batches: int) -> StepPlan:
    """Groups of ``degree`` slots, with as many sequences in each group; estimates are 0 (there is no cost model).

    ``num_slots / degree * num_micro_batches`` must divide the number of sequences.
    """
    num_groups = num_slots // degree
    rows, rest = divmod(len(lengths), num_groups * num_micro_batches)
    if rest or num_slots % degree:
        raise ValueError(f"{len(lengths)} sequences in {num_micro_batches} x {num_groups} groups of {degree}")
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    size = num_groups * rows
    chunks = [longest_first[at : at + size] for at in range(0, len(lengths), size)]
    batches = [_groups(_balanced(chunk, lengths, num_groups, rows=rows), degree) for chunk in chunks]
    return _plan(batches, num_slots, status="given")


def homogeneous(lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> StepPlan:
    """The fastest of the plans with one degree for all groups of all micro-batches.

    Raises:
        InfeasibleError: a sequence does not fit the memory of the widest group.
    """
    longest = max(lengths, default=0)
    degrees = [degree for degree in cost.degrees(num_slots) if cost.capacity(degree) >= longest]
    if not degrees:
        widest = cost.degrees(num_slots)[-1]
        raise InfeasibleError(
            "a sequence does not fit the memory of the widest group",
            got=f"{longest} tokens",
            allowed=f"{cost.capacity(widest)} tokens on {widest} devices",
            hint="more devices, more tokens_per_gpu, or leave it out",
        )
    plans = [_of_degree(lengths, degree, num_slots=num_slots, cost=cost) for degree in degrees]
    return min(plans, key=lambda plan: plan.estimated_ms)


def _of_degree(lengths: Sequence[int], degree: int, *, num_slots: int, cost: SequenceCost) -> StepPlan:
    """The plan with the fewest micro-batches that memory allows."""
    num_groups, capacity = num_slots // degree, cost.capacity(degree)
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    num = max(1, math.ceil(sum(lengths) / (num_groups * capacity)))
    while True:
        chunks = _chunks(longest_first, lengths, num)
        shares = [_balanced(chunk, lengths, num_groups) for chunk in chunks]
        if all(sum(lengths[i] for i in share) <= capacity for groups in shares for share in groups):
            batches = [_groups(groups, degree, cost=cost, lengths=lengths) for groups in shares]
            return _plan(batches, num_slots, status="feasible")
        num += max(1, num // 8)


def _chunks(longest_first: list[int], lengths: Sequence[int], num: int) -> list[list[int]]:
    """Runs of about equal tokens; with enough of them each sequence has its own."""
    most = sum(lengths) / num
    chunks: list[list[int]] = []
    filled = math.inf
    for index in longest_first:
        if filled + lengths[index] > most:
            chunks.append([])
            filled = 0
        chunks[-1].append(index)
        filled += lengths[index]
    return chunks


def _balanced(
    longest_first: Sequence[int], lengths: Sequence[int], num_groups: int, *, rows: int | None = None
) -> list[list[int]]:
    """Each to the group with the fewest tokens among those with less than ``rows`` sequences (LPT)."""
    shares: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0, group) for group in range(num_groups)]
    for index in longest_first:
        load, group = heapq.heappop(loads)
        shares[group].append(index)
        if rows is None or len(shares[group]) < rows:
            heapq.heappush(loads, (load + lengths[index], group))
    return shares


def _groups(
    shares: Sequence[Sequence[int]],
    degree: int,
    *,
    cost: SequenceCost | None = None,
    lengths: Sequence[int] = (),
) -> MicroBatch:
    return tuple(
        SequenceGroup(
            tuple(range(degree * at, degree * (at + 1))),
            tuple(share),
            cost.group_ms([lengths[index] for index in share], degree) if cost else 0.0,
        )
        for at, share in enumerate(shares)
        if share
    )


def _plan(batches: Sequence[MicroBatch], num_slots: int, *, status: str) -> StepPlan:
    ms = step_ms(batches, num_slots=num_slots, schedule="lock-step")
    return StepPlan(
        microbatches=tuple(batches),
        num_slots=num_slots,
        estimated_ms=ms,
        lower_bound_ms=0.0,
        gap=1.0 if ms else 0.0,
        status=status,
        seconds=0.0,
        reasons=("one degree for all groups",),
    )
