"""PyTorch's own: DDP, FSDP2, ZeroRedundancyOptimizer, and torch.distributed.pipelining."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distrain.planners.stages import stage_layers

from .base import CPU, Job, adamw, adamw_options, build_model, decay_groups, mean_loss


class DataParallel:
    """Each rank trains the whole model on its share of the batch."""

    def __init__(self, rank: int, world_size: int, job: Job, *, how: str) -> None:
        self._rank, self._world_size = rank, world_size
        self._model = build_model(job)
        self._wrapped: nn.Module = self._model
        if how == "fsdp2":
            for unit in (*self._model.layers.values(), self._model):
                fully_shard(unit)
        else:
            self._wrapped = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._optimizer: torch.optim.Optimizer
        if how == "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

            self._optimizer = ZeroRedundancyOptimizer(
                decay_groups(self._model.parameters(), job.optimizer),
                optimizer_class=torch.optim.AdamW,
                parameters_as_bucket_view=True,
                **adamw_options(job.optimizer),  # type: ignore[arg-type]
            )
        else:
            self._optimizer = adamw(self._model.parameters(), job.optimizer)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x, y = (ids.chunk(self._world_size)[self._rank] for ids in (inputs, targets))
        self._optimizer.zero_grad()
        loss = mean_loss(self._wrapped(x), y)
        loss.backward()
        self._optimizer.step()
        return loss.detach() / self._world_size

    def finish(self) -> None:
        pass

    def weights(self) -> dict[str, Tensor]:
        named = self._model.named_parameters()
        return {name: param.full_tensor() if isinstance(param, DTensor) else param for name, param in named}


class Pipeline:
    """One or two stages a rank under a schedule of torch."""

    def __init__(self, rank: int, world_size: int, job: Job, *, v_shape: bool) -> None:
        num_stages = world_size * (2 if v_shape else 1)
        indices = [rank, num_stages - 1 - rank] if v_shape else [rank]
        ranges = stage_layers(job.shape.num_layers, num_stages)
        self._models = [build_model(job, first_layer=ranges[i][0], last_layer=ranges[i][1]) for i in indices]
        stages = [PipelineStage(m, i, num_stages, CPU) for m, i in zip(self._models, indices, strict=True)]
        self._schedule = (
            ScheduleZBVZeroBubble(stages, job.micro_batches, loss_fn=mean_loss)  # type: ignore[arg-type]
            if v_shape
            else Schedule1F1B(stages[0], job.micro_batches, loss_fn=mean_loss)
        )
        self._is_first, self._is_last = 0 in indices, num_stages - 1 in indices
        self._optimizer = adamw([p for model in self._models for p in model.parameters()], job.optimizer)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        self._schedule.step(
            *((inputs,) if self._is_first else ()),
            target=targets if self._is_last else None,
            losses=losses if self._is_last else None,
        )
        self._optimizer.step()
        return torch.stack([loss.detach() for loss in losses]).mean() if losses else None

    def finish(self) -> None:
        pass

    def weights(self) -> dict[str, Tensor]:
        return dict(item for model in self._models for item in model.named_parameters())


ddp = partial(DataParallel, how="ddp")
fsdp2 = partial(DataParallel, how="fsdp2")
zero = partial(DataParallel, how="zero")
pipeline_1f1b = partial(Pipeline, v_shape=False)
pipeline_zbv = partial(Pipeline, v_shape=True)
