"""The best lock-step plan of a few sequences, by looking at every plan: what bounds and planners are held against.

Two dynamic programs over subsets. The best wave of a set on n slots gives the group of its first sequence some of the
others and some degree, and the rest of the set the slots that are left; the best plan of a set is a wave of its first
sequence and some others, and the best plan of the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from distrain.planners.sequence.cost import SequenceCost


def best_plan_ms(lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> float:
    """Least ms of a step over at most eight or so ``lengths``; infinite if there is no plan."""
    wave_ms = _waves(lengths, num_slots, cost)

    @cache
    def plan_ms(members: int) -> float:
        if not members:
            return 0.0
        return min(
            wave_ms(part, num_slots) + cost.beta1 + plan_ms(members ^ part) for part in _parts(members)
        )

    return plan_ms((1 << len(lengths)) - 1)


def best_wave_ms(lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> float:
    """Least duration, without beta1, of one micro-batch of all ``lengths``."""
    return _waves(lengths, num_slots, cost)((1 << len(lengths)) - 1, num_slots)


def _waves(lengths: Sequence[int], num_slots: int, cost: SequenceCost) -> Callable[[int, int], float]:
    degrees = cost.degrees(num_slots)

    @cache
    def group_ms(members: int, degree: int) -> float:
        own = [length for index, length in enumerate(lengths) if members >> index & 1]
        return cost.group_ms(own, degree) - cost.beta1 if sum(own) <= cost.capacity(degree) else math.inf

    @cache
    def wave_ms(members: int, slots: int) -> float:
        if not members:
            return 0.0
        return min(
            (
                max(group_ms(part, degree), wave_ms(members ^ part, slots - degree))
                for part in _parts(members)
                for degree in degrees
                if degree <= slots
            ),
            default=math.inf,
        )

    return wave_ms


def _parts(members: int) -> Iterator[int]:
    """Subsets that hold the first member."""
    first = members & -members
    others = members ^ first
    part = others
    while True:
        yield part | first
        if not part:
            return
        part = (part - 1) & others
