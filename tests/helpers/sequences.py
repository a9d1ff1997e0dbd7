"""Packed sequences in groups of ranks, trained beside ``parity``'s one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from distrain.core.vocabulary import Degrees
from distrain.parallel import MicroBatch, buckets, init
from distrain.parallel.sequence.adaptive import PackedRow, Place, SequenceGroups, Split, places
from distrain.parallel.sequence.layout import usp_degrees
from distrain.planners.sequence.step_plan import SequenceGroup, StepPlan
from distrain.train.assembly import assemble
from distrain.train.data.micro import pack
from distrain.train.model import Packed

from . import parity
from .parity import SEED, Case, Outcome, Pairs

LENGTHS = (13, 40, 9, 3, 21, 17, 1, 30)
Groups = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""of one micro-batch: (slots, sequences) each"""


@dataclass(frozen=True)
class SequenceCase(Case):
    """``lengths`` are those of sequences; ``groups`` are the micro-batches, the same in each step."""

    degrees: Degrees = field(default_factory=lambda: Degrees(dp=4))
    lengths: tuple[int, ...] = LENGTHS
    groups: tuple[Groups, ...] = ()
    ring: int = 0
    """ring degree of every group of more than one rank; 0 is 1 while heads allow"""
    steps: tuple[tuple[Groups, ...], ...] = ()
    """micro-batches of each step, if they differ"""
    skip_idle: bool = False

    def __str__(self) -> str:
        sizes = ["+".join(str(len(slots)) for slots, _ in groups) for groups in self.groups]
        skipping = "-skipping" if self.skip_idle else ""
        return f"{super().__str__()}-{'|'.join(sizes)}-ring{self.ring}{skipping}"

    def plan(self, step: int) -> StepPlan:
        """The plan of a step."""
        return plan_of(self.steps[step] if self.steps else self.groups, num_slots=self.degrees.dp)

    def split(self, degree: int) -> tuple[int, int]:
        """(ulysses, ring) of a group."""
        if self.ring and degree > 1:
            return degree // self.ring, self.ring
        return usp_degrees(degree, num_heads=self.shape.num_heads // self.degrees.tp)


def plan_of(microbatches: Sequence[Groups], *, num_slots: int) -> StepPlan:
    """A plan with these groups."""
    return StepPlan(
        microbatches=tuple(
            tuple(SequenceGroup(slots, sequences, 1.0) for slots, sequences in groups)
            for groups in microbatches
        ),
        num_slots=num_slots,
        estimated_ms=1.0,
        lower_bound_ms=0.0,
        gap=1.0,
        status="feasible",
        seconds=0.0,
    )


def sequences_of(case: Case, step: int) -> list[torch.Tensor]:
    """Ids of each sequence, [length + 1]."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randint(0, case.shape.vocab_size, (length + 1,), generator=generator) for length in case.lengths
    ]


def pairs_of(case: Case, step: int) -> Pairs:
    """Inputs and targets of each sequence by itself, for one process."""
    return [(ids[None, :-1], ids[None, 1:]) for ids in sequences_of(case, step)]


def alone(case: SequenceCase) -> Outcome:
    """One process, a sequence at a time."""
    return parity.one_process(case, pairs_of=lambda step: pairs_of(case, step))


def in_groups(
    rank: int, world_size: int, case: SequenceCase, told: Callable[[PackedRow], Packed] = lambda row: row
) -> Outcome:
    """The same on one rank of a job, whose model is told what ``told`` makes of each row."""
    buckets.SMALLEST_BUCKET_BYTES = case.smallest_bucket_bytes
    parallel = init(case.degrees, device="cpu")
    assembly = assemble(
        case.shape,
        parallel,
        schedule=case.schedule,
        data=case.data,
        micro_batches=case.degrees.pp,
        seed=SEED,
        dtype=torch.float64,
    )
    slot, tp = parallel.coordinates["dp"], case.degrees.tp
    split: Split = case.split
    groups = SequenceGroups(
        torch.distributed.get_process_group_ranks(parallel.groups.axis("dp")),
        slot=slot,
        groups=parallel.groups,
        split=split,
        window=case.shape.window,
        device=parallel.device.torch_device,
    )

    def share(step: int) -> tuple[list[MicroBatch], int]:
        sequences, plan = sequences_of(case, step), case.plan(step)
        assert not plan.check(case.lengths)
        mine = places(
            plan,
            case.lengths,
            slot=slot,
            split=split,
            multiple_of=tp,
            in_multiples=case.degrees.pp,
            skip_idle=case.skip_idle,
        )
        rows = groups.rows(plan, mine)

        def micro_batch(place: Place, row: PackedRow) -> MicroBatch:
            arrays = pack([sequences[i].numpy() for i in place.sequences], place.tokens())
            inputs, targets = map(torch.from_numpy, arrays)
            return MicroBatch(inputs, targets, (1, inputs.shape[1] // tp, case.shape.d_model), told(row))

        return [micro_batch(*each) for each in zip(mine, rows, strict=True)], sum(case.lengths)

    return parity.train(case, parallel, assembly, share)
