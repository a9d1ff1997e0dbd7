"""Groups that change from micro-batch to micro-batch: from the plan of a step to what one rank attends with.

A plan speaks of slots, the data-parallel places 0..N-1 at one (tp, pp) coordinate. In each micro-batch a slot is in
one group, or idle::

    plan          [ 0 1 2 3 ] | [ 0 1 ][ 2 ][ 3 ] | [ 0 ][ 1 2 ]
    slot 3        index 3 of 4  index 0 of 1        idle

``places`` says where a slot stands, without any process; every rank, stage and replica computes the same layouts from
the same plan. ``SequenceGroups`` makes the process groups when a plan first asks for them and keeps them. Only its
members make a group or give it up, so all of them must decide alike: each rank follows the groups of *all* slots
through the same plans and drops the same ones, the longest unused of a slot that has too many.

An idle slot computes a few tokens without loss, since it must still enter whatever all replicas do together, such as
the gathers of FSDP2, and pass through the same schedule of a pipeline. Where there is neither, it does nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.parallel.groups import GroupRegistry
from distrain.planners.sequence.step_plan import SequenceGroup, StepPlan

from .attention import SequenceAttention
from .layout import SequenceLayout

MOST_GROUPS = 32
"""process groups that a rank keeps for sequences; a communicator of NCCL takes tens of megabytes"""

Split = Callable[[int], tuple[int, int]]
"""from the degree of a group to (ulysses, ring), whose product it is"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one slot stands in one micro-batch."""

    slots: tuple[int, ...]
    """all slots of the group, ascending"""
    index: int
    """of this slot among them"""
    sequences: tuple[int, ...]
    """what the group computes, as indices of the plan; empty for an idle slot"""
    layout: SequenceLayout

    def tokens(self) -> NDArray[np.int64]:
        """[num_local]: numbers of this slot's tokens in the group's concatenated sequences; -1 for padding."""
        if not self.sequences:
            return np.full(self.layout.num_local, -1, dtype=np.int64)
        return self.layout.tokens(self.index)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """What a model is told of its tokens in one micro-batch; a ``train.model.Packed``."""

    positions: Tensor
    """int64 [T], each token's place in its own sequence"""
    attention: SequenceAttention

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Causal attention inside each sequence, together with the other ranks of the group: [T, H, E]."""
        return self.attention.attend(q_THE, k_TKE, v_TKE)


def places(
    plan: StepPlan,
    lengths: Sequence[int],
    *,
    slot: int,
    split: Split,
    multiple_of: int = 1,
    in_multiples: int = 1,
    skip_idle: bool = False,
) -> list[Place]:
    """Where ``slot`` stands in each micro-batch of ``plan``; all idle ones are added until ``in_multiples`` divides.

    ``lengths`` are those that were planned. A rank's tokens are padded to a multiple of ``multiple_of``. With
    ``skip_idle`` micro-batches in which the slot is idle are left out, but for one if they are all, so that slots
    have different numbers of them: where nothing else keeps them in step.
    """
    found = [_place(groups, lengths, slot, split, multiple_of) for groups in plan.microbatches]
    if skip_idle:
        found = [place for place in found if place.sequences] or found[:1]
    return found + [_idle(slot, multiple_of)] * (-len(found) % in_multiples)


def _place(
    groups: Sequence[SequenceGroup], lengths: Sequence[int], slot: int, split: Split, multiple_of: int
) -> Place:
    for group in groups:
        if slot in group.ranks and group.sequences:
            ulysses, ring = split(group.degree)
            chosen = [lengths[sequence] for sequence in group.sequences]
            layout = SequenceLayout.build(chosen, ulysses=ulysses, ring=ring, multiple_of=multiple_of)
            return Place(group.ranks, group.ranks.index(slot), group.sequences, layout)
    return _idle(slot, multiple_of)


def _idle(slot: int, multiple_of: int) -> Place:
    return Place((slot,), 0, (), SequenceLayout.build([multiple_of], multiple_of=multiple_of))


class SequenceGroups:
    """This rank's process groups for sequences; the same plans must pass through those of all ranks."""

    def __init__(
        self,
        slots: Sequence[int],
        *,
        slot: int,
        groups: GroupRegistry,
        split: Split,
        window: int,
        device: torch.device,
        most: int = MOST_GROUPS,
    ) -> None:
        """``slots`` are the global ranks of the data plane by slot, ``slot`` is this rank's own."""
        self._ranks, self._slot = tuple(slots), slot
        self._groups = groups.apart("sequence")
        self._split, self._window, self._device, self._most = split, window, device, most
        self._used: dict[tuple[int, ...], None] = {}  # groups of any slots, the longest unused first
        self._count: Counter[int] = Counter()  # of these, by slot

    def rows(self, plan: StepPlan, mine: Sequence[Place]) -> list[PackedRow]:
        """What the model is told in each micro-batch of ``plan``, where this slot stands as ``places`` said.

        Makes the groups that are missing, and drops some if there are too many: nothing may be under way.
        """
        self._follow(plan)
        return [self._row(place) for place in mine]

    def _row(self, place: Place) -> PackedRow:
        positions = torch.from_numpy(place.layout.positions(place.index)).to(self._device)
        ranks = [self._ranks[slot] for slot in place.slots]
        attention = SequenceAttention(
            place.layout, index=place.index, ranks=ranks, groups=self._groups, window=self._window
        )
        return PackedRow(positions, attention)

    def _follow(self, plan: StepPlan) -> None:
        """Note which groups the plan uses, on all slots, and give up what no rank may keep."""
        current = {
            part
            for groups in plan.microbatches
            for group in groups
            if group.sequences
            for part in _parts(group.ranks, *self._split(group.degree))
        }
        for part in sorted(current):
            if part in self._used:
                del self._used[part]
            else:
                self._count.update(part)
            self._used[part] = None
        full = {slot for slot, count in self._count.items() if count > self._most}
        for part in [part for part in self._used if part not in current] if full else ():
            if not full.isdisjoint(part):
                del self._used[part]
                self._count.subtract(part)
                full -= {slot for slot in part if self._count[slot] <= self._most}
                if self._slot in part:
                    self._groups.drop([self._ranks[slot] for slot in part])


def _parts(slots: tuple[int, ...], ulysses: int, ring: int) -> list[tuple[int, ...]]:
    """The process groups of a group of slots: those that share heads, and those that pass keys round."""
    shares = (
        [slots[first : first + ulysses] for first in range(0, len(slots), ulysses)] if ulysses > 1 else []
    )
    rings = [slots[first::ulysses] for first in range(ulysses)] if ring > 1 else []
    return [*shares, *rings]
