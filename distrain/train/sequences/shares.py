"""What of a batch one rank computes: rows of whole sequences, or its part of sequences that groups of ranks share.

A share is prepared in a thread one step ahead. What needs the other ranks, process groups above all, is done by
``ready`` when its step comes, in the thread that trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from distrain.core.config import RunConfig
from distrain.core.vocabulary import DataParallel, ModelShape, Schedule
from distrain.parallel import MicroBatch, Parallel
from distrain.parallel.sequence.adaptive import Place, SequenceGroups, places
from distrain.planners.parallel_plan import ParallelPlan
from distrain.train.data.batches import BatchStream, GlobalBatch
from distrain.train.data.corpus import Split
from distrain.train.data.micro import collate, pack, split

from .plans import Planned, Plans, PlansAhead, StaticPlans
from .settings import SequenceSettings


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's micro-batches of a step."""

    micro_batches: Sequence[MicroBatch]
    planned: Planned | None = None
    """how sequences were dealt to groups, if they were"""
    places: Sequence[Place] = ()
    """where this rank stands in each micro-batch"""


class Shares(Protocol):
    """How batches become shares."""

    def expect(self, part: Split, stream: BatchStream, *, num_batches: int) -> None:
        """Say that shares of the next ``num_batches`` batches of ``stream`` will be prepared."""

    def prepare(self, part: Split, stream: BatchStream, batch: GlobalBatch) -> Share:
        """This rank's share of ``batch``; reads its tokens."""
        ...

    def ready(self, share: Share) -> Sequence[MicroBatch]:
        """The micro-batches, now complete; all ranks call it for the same shares in the same order."""
        ...

    def close(self) -> None:
        """No share will be needed any more."""


def build_shares(
    config: RunConfig, plan: ParallelPlan, parallel: Parallel, *, sequences: SequenceSettings | None
) -> Shares:
    """Shares as ``parallel.sequence`` says, which ``sequences`` has worked out."""
    if sequences is None:
        return RowShares(config.model.shape(), plan, parallel)
    return PackedShares(config.model.shape(), plan, parallel, sequences)


class RowShares:
    """Rows of whole sequences, padded to the longest."""

    def __init__(self, shape: ModelShape, plan: ParallelPlan, parallel: Parallel) -> None:
        self._shape, self._plan, self._parallel = shape, plan, parallel

    def expect(self, part: Split, stream: BatchStream, *, num_batches: int) -> None:
        """Nothing to do; see Shares."""

    def prepare(self, part: Split, stream: BatchStream, batch: GlobalBatch) -> Share:
        """See Shares."""
        degrees, device = self._plan.degrees, self._parallel.device.torch_device
        dealt = split(batch, dp=degrees.dp, micro_batches=self._plan.micro_batches, multiple_of=degrees.tp)
        micro_batches = []
        for replicas in dealt:
            mine = replicas[self._parallel.coordinates["dp"]]
            arrays = collate(stream.fetch(mine.ids), padded_len=mine.padded_len)
            inputs, targets = (torch.from_numpy(array).to(device) for array in arrays)
            hidden_shape = (mine.rows, mine.padded_len // degrees.tp, self._shape.d_model)
            micro_batches.append(MicroBatch(inputs, targets, hidden_shape))
        return Share(micro_batches)

    def ready(self, share: Share) -> Sequence[MicroBatch]:
        """They are; see Shares."""
        return share.micro_batches

    def close(self) -> None:
        """Nothing to do; see Shares."""


class PackedShares:
    """One row of packed tokens a micro-batch, of sequences that this rank's group shares."""

    def __init__(
        self, shape: ModelShape, plan: ParallelPlan, parallel: Parallel, settings: SequenceSettings
    ) -> None:
        """All ranks make one at the same time."""
        degrees = plan.degrees
        self._shape, self._tp, self._settings = shape, degrees.tp, settings
        self._device = parallel.device.torch_device
        self._slot = parallel.coordinates["dp"]
        # Without pipeline or sharded parameters nothing but its groups keeps a rank in step with others.
        self._is_free = degrees.pp == 1 and plan.data in (DataParallel.DDP, DataParallel.ZERO1)
        self._in_multiples = degrees.pp if plan.schedule is Schedule.INTERLEAVED else 1
        self._plans: Plans = (
            StaticPlans(settings, micro_batches=plan.micro_batches)
            if settings.cost is None
            else PlansAhead(settings, device=self._device, schedule="auto" if self._is_free else "lock-step")
        )
        self._groups = SequenceGroups(
            dist.get_process_group_ranks(parallel.groups.axis("dp")),
            slot=self._slot,
            groups=parallel.groups,
            split=settings.split,
            window=shape.window,
            device=self._device,
        )

    def expect(self, part: Split, stream: BatchStream, *, num_batches: int) -> None:
        """See Shares."""
        self._plans.expect(part, [stream.peek(ahead) for ahead in range(num_batches)])

    def prepare(self, part: Split, stream: BatchStream, batch: GlobalBatch) -> Share:
        """See Shares."""
        planned = self._plans.plan(part, batch)
        mine = places(
            planned.plan,
            batch.lengths.tolist(),
            slot=self._slot,
            split=self._settings.split,
            multiple_of=self._tp,
            in_multiples=self._in_multiples,
            skip_idle=self._is_free,
        )
        return Share([self._micro_batch(stream, batch, place) for place in mine], planned, mine)

    def ready(self, share: Share) -> Sequence[MicroBatch]:
        """See Shares."""
        assert share.planned is not None
        rows = self._groups.rows(share.planned.plan, share.places)
        return [
            replace(micro_batch, packed=row)
            for micro_batch, row in zip(share.micro_batches, rows, strict=True)
        ]

    def close(self) -> None:
        """See Shares."""
        self._plans.close()

    def _micro_batch(self, stream: BatchStream, batch: GlobalBatch, place: Place) -> MicroBatch:
        arrays = pack(stream.fetch(batch.ids[list(place.sequences)]), place.tokens())
        inputs, targets = (torch.from_numpy(array).to(self._device) for array in arrays)
        return MicroBatch(inputs, targets, (1, inputs.shape[1] // self._tp, self._shape.d_model))
