"""Ranks that train a packed decoder by a plan: which groups they form in each micro-batch is the plan's affair.

One worker serves every plan, adaptive or of one degree, so that contenders differ in nothing else. With
``deepspeed=True`` the heads are exchanged by DeepSpeed-Ulysses' ``DistributedAttention`` instead of ours; the
attention inside is the same.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distrain.core.config import OptimizerConfig
from distrain.core.vocabulary import DataParallel, Degrees, ModelShape, Schedule
from distrain.parallel import MicroBatch, init
from distrain.parallel.sequence.adaptive import PackedRow, Place, SequenceGroups, places
from distrain.parallel.sequence.attention import SequenceAttention
from distrain.parallel.sequence.layout import SequenceLayout
from distrain.planners.sequence.step_plan import StepPlan
from distrain.train.assembly import assemble
from distrain.train.data.micro import pack
from distrain.train.model import Packed
from distrain.train.optim import build_optimizer

from .training_contenders.base import Arrays, adamw, build_model
from .training_contenders.base import Job as Plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained."""

    shape: ModelShape
    lengths: tuple[int, ...]
    """tokens of each sequence of a step"""
    seed: int = 7
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, eps=1e-6, clip=0.0))

    def ids(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """A sequence of each length: int64 [length + 1]."""
        generator = np.random.default_rng(self.seed)
        return [generator.integers(self.shape.vocab_size, size=length + 1) for length in lengths]


def ulysses(degree: int) -> tuple[int, int]:
    """(ulysses, ring): all by heads, as DeepSpeed has it."""
    return degree, 1


class Worker:
    """One rank; the methods are what a crew is asked for."""

    def __init__(self, rank: int, world_size: int, job: Job, *, deepspeed: bool = False) -> None:
        self._job, self._rank = job, rank
        self._parallel = init(Degrees(dp=world_size), device="cpu")
        self._assembly = assemble(
            job.shape,
            self._parallel,
            schedule=Schedule.ONE_F_ONE_B,
            data=DataParallel.DDP,
            micro_batches=1,
            seed=job.seed,
        )
        self._data = self._assembly.data
        self._groups = SequenceGroups(
            range(world_size),
            slot=rank,
            groups=self._parallel.groups,
            split=ulysses,
            window=job.shape.window,
            device=self._parallel.device.torch_device,
        )
        self._deepspeed = self._parallel.groups.apart("deepspeed") if deepspeed else None
        self._restart()

    def _restart(self) -> None:
        fresh = build_model(Plain(shape=self._job.shape, seed=self._job.seed))
        (module,) = self._assembly.modules.values()
        with torch.no_grad():
            for param, first in zip(module.parameters(), fresh.parameters(), strict=True):
                param.copy_(first)
        self._optimizer = build_optimizer(self._data.shards, self._job.optimizer, names=(), group=None)

    def checked(self, plan: StepPlan, num_steps: int) -> tuple[list[float], Arrays]:
        """This rank's shares of the losses of the first steps from the beginning, and the weights after them."""
        self._restart()
        batch = self._micro_batches(plan, self._job.lengths)
        losses = [self._step(batch) for _ in range(num_steps)]
        (module,) = self._assembly.modules.values()
        named = module.named_parameters() if self._rank == 0 else ()
        return losses, {name: param.detach().clone().numpy() for name, param in named}

    def train(self, plan: StepPlan, num_steps: int) -> tuple[float, float, float]:
        """Start and end on the machine's clock, and CPU time used, all in seconds."""
        batch = self._micro_batches(plan, self._job.lengths)
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            self._step(batch)
        return start, time.perf_counter(), time.process_time() - used

    def timed(self, plan: StepPlan, lengths: Sequence[int]) -> list[tuple[float, float]]:
        """Start and end of forward and backward in each micro-batch, which all ranks begin together."""
        # An idle micro-batch more, so that the reduction of gradients starts in none of those that count.
        *batch, idle = self._micro_batches(plan, lengths, in_multiples=len(plan.microbatches) + 1)
        self._data.begin(len(batch) + 1)
        spans = []
        for micro_batch in batch:
            dist.barrier()
            start = time.perf_counter()
            self._assembly.runtime.step([micro_batch])
            spans.append((start, time.perf_counter()))
        self._assembly.runtime.step([idle])
        self._data.reduce()
        return spans

    def _step(self, batch: Sequence[MicroBatch]) -> float:
        """One optimizer step; this rank's share of the mean loss."""
        self._assembly.loss.num_tokens = sum(self._job.lengths)
        self._data.begin(len(batch))
        losses = self._assembly.runtime.step(batch)
        self._data.reduce()
        self._optimizer.step()
        self._data.updated()
        return float(torch.stack(losses).sum())

    def _micro_batches(
        self, plan: StepPlan, lengths: Sequence[int], *, in_multiples: int = 1
    ) -> list[MicroBatch]:
        mine = places(plan, lengths, slot=self._rank, split=ulysses, in_multiples=in_multiples)
        rows, ids = self._groups.rows(plan, mine), self._job.ids(lengths)
        return [self._micro_batch(place, row, ids) for place, row in zip(mine, rows, strict=True)]

    def _micro_batch(self, place: Place, row: PackedRow, ids: Sequence[np.ndarray]) -> MicroBatch:
        inputs, targets = map(
            torch.from_numpy, pack([ids[sequence] for sequence in place.sequences], place.tokens())
        )
        packed: Packed = row
        if self._deepspeed and len(place.slots) > 1:
            group = self._deepspeed.of(place.slots)
            packed = DeepSpeedRow(row.positions, group, SequenceLayout.build(place.layout.lengths))
        return MicroBatch(inputs, targets, (*inputs.shape, self._job.shape.d_model), packed)


class DeepSpeedRow:
    """A packed row whose ranks exchange heads as DeepSpeed does."""

    def __init__(self, positions: Tensor, group: dist.ProcessGroup, alone: SequenceLayout) -> None:
        """``alone`` is how the group's sequences lie on one rank."""
        from deepspeed.sequence.layer import DistributedAttention

        self.positions = positions
        self._inside = SequenceAttention(alone)
        self._around = DistributedAttention(self._attend, group, scatter_idx=2, gather_idx=1)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """See ``train.model.Packed``."""
        out: Tensor = self._around(q_THE[None], k_TKE[None], v_TKE[None], 0)
        return out[0]

    def _attend(self, *qkv_1NHE: Tensor) -> Tensor:
        """Some heads of all tokens; padding comes last."""
        num_real, num_all = self._inside.layout.num_local, qkv_1NHE[0].shape[1]
        out_NHE = self._inside.attend(*(tensor[0, :num_real] for tensor in qkv_1NHE))
        return F.pad(out_NHE, (0, 0, 0, 0, 0, num_all - num_real))[None]


def with_deepspeed(rank: int, world_size: int, job: Job) -> Worker:
    """A rank of the crew that uses DeepSpeed-Ulysses."""
    from .training_contenders.deepspeed_engines import deepspeed_on_cpu

    deepspeed_on_cpu()
    return Worker(rank, world_size, job, deepspeed=True)


class Reference:
    """One rank, one sequence after the other, in plain PyTorch: all others are held against it."""

    def __init__(self, rank: int, world_size: int, job: Job) -> None:
        self._job, self._model = job, build_model(Plain(shape=job.shape, seed=job.seed))
        self._optimizer = adamw(self._model.parameters(), job.optimizer)

    def checked(self, num_steps: int) -> tuple[list[float], Arrays]:
        """Losses of the first steps, and the weights after them."""
        return [self._step() for _ in range(num_steps)], {
            name: param.detach().numpy() for name, param in self._model.named_parameters()
        }

    def _step(self) -> float:
        self._optimizer.zero_grad()
        total = 0.0
        for ids in self._job.ids(self._job.lengths):
            x, y = torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[None, 1:])
            loss = F.cross_entropy(self._model(x).flatten(0, 1), y.flatten(), reduction="sum")
            loss = loss / sum(self._job.lengths)
            loss.backward()
            total += loss.item()
        self._optimizer.step()
        return total
