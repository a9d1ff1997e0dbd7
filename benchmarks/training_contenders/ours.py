"""Distrain: the pieces that ``distrain train`` puts together, driven as its loop drives them."""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distrain.core.vocabulary import DataParallel, Degrees, Schedule
from distrain.parallel import MicroBatch, init
from distrain.train.assembly import assemble
from distrain.train.optim import build_optimizer

from .base import Job


class Ours:
    """One rank under a layout."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        job: Job,
        *,
        pipeline: bool = False,
        schedule: Schedule = Schedule.ONE_F_ONE_B,
        data: DataParallel = DataParallel.DDP,
    ) -> None:
        degrees = Degrees(
            pp=world_size if pipeline else 1,
            dp=1 if pipeline else world_size,
            vpp=2 if schedule is Schedule.ZBV else 1,
            dp_shard=world_size if data is DataParallel.FSDP2 else 1,
        )
        self._parallel = init(degrees, device="cpu")
        self._job = job
        self._assembly = assemble(
            job.shape,
            self._parallel,
            schedule=schedule,
            data=data,
            micro_batches=job.micro_batches,
            seed=job.seed,
        )
        self._assembly.loss.num_tokens = job.tokens_per_step
        self._data = self._assembly.data
        self._optimizer = build_optimizer(self._data.shards, job.optimizer, names=(), group=None)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        dp = self._parallel.degrees.dp
        rows = slice(*(len(inputs) // dp * (self._parallel.coordinates["dp"] + i) for i in (0, 1)))
        pairs = zip(*(ids[rows].chunk(self._job.micro_batches) for ids in (inputs, targets)), strict=True)
        width = self._job.shape.d_model
        micro_batches = [MicroBatch(x, y, (*x.shape, width)) for x, y in pairs]
        losses = self._assembly.runtime.step(micro_batches)
        self._data.reduce()
        self._optimizer.step()
        self._data.updated()
        return torch.stack(losses).sum() if losses else None

    def finish(self) -> None:
        self._data.gather()

    def weights(self) -> dict[str, Tensor]:
        named = [item for module in self._assembly.modules.values() for item in module.named_parameters()]
        return {name: param.full_tensor() if isinstance(param, DTensor) else param for name, param in named}


ddp = partial(Ours, data=DataParallel.DDP)
zero1 = partial(Ours, data=DataParallel.ZERO1)
fsdp = partial(Ours, data=DataParallel.FSDP2)
pipeline_1f1b = partial(Ours, pipeline=True)
pipeline_zbv = partial(Ours, pipeline=True, schedule=Schedule.ZBV)
