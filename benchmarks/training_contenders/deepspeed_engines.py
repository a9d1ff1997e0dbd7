"""DeepSpeed on the CPU: ZeRO-1, ZeRO-3 and PipelineModule with torch's fused AdamW as client optimizer.

DeepSpeed is an optional extra; without it these contenders do not take part. Its first use on a machine compiles a
communication extension for about a minute, before anything is timed.
"""

import logging
import os
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from distrain.planners.stages import stage_layers

from .base import Job, adamw, build_model, mean_loss

HINT = "pip install -c .venv/constraints.txt -e '.[deepspeed]'"


def is_installed() -> bool:
    """Whether DeepSpeed can be imported; it is not."""
    return find_spec("deepspeed") is not None


def deepspeed_on_cpu() -> Any:
    """The package, joined to this rank's process group."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    return deepspeed


class Zero:
    """Data parallelism with sharded states."""

    def __init__(self, rank: int, world_size: int, job: Job, *, stage: int) -> None:
        self._deepspeed = deepspeed_on_cpu()
        self._rank, self._world_size, self._stage = rank, world_size, stage
        self._model = build_model(job)
        self._engine, *_ = self._deepspeed.initialize(
            model=self._model,
            optimizer=adamw(self._model.parameters(), job.optimizer),
            config={
                "train_micro_batch_size_per_gpu": job.global_batch // world_size,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # it clips to 1.0 unless told
                "communication_data_type": "fp32",
            },
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x, y = (ids.chunk(self._world_size)[self._rank] for ids in (inputs, targets))
        loss = mean_loss(self._engine(x), y)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach() / self._world_size

    def finish(self) -> None:
        pass

    def weights(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self._model.named_parameters())
        if self._stage < 3:
            return named
        with self._deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: param.detach().clone() for name, param in named.items()}


class Pipeline:
    """PipelineModule: one of our stages is one of its layers, so that both cut the model alike."""

    def __init__(self, rank: int, world_size: int, job: Job) -> None:
        deepspeed = deepspeed_on_cpu()
        from deepspeed.pipe import PipelineModule

        ranges = stage_layers(job.shape.num_layers, world_size)
        stages = [build_model(job, first_layer=first, last_layer=last) for first, last in ranges]
        self._stage = stages[rank]
        self._job = job
        self._is_last = rank == world_size - 1
        module = PipelineModule(
            layers=stages, num_stages=world_size, loss_fn=mean_loss, partition_method="uniform"
        )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(self._stage.parameters(), job.optimizer),
            config={
                "train_batch_size": job.global_batch,
                "train_micro_batch_size_per_gpu": job.global_batch // job.micro_batches,
                "gradient_accumulation_steps": job.micro_batches,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # it clips to 1.0 unless told
            },
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        pairs = zip(*(ids.chunk(self._job.micro_batches) for ids in (inputs, targets)), strict=True)
        loss: Tensor = self._engine.train_batch(data_iter=iter(pairs))
        return loss.detach() if self._is_last else None

    def finish(self) -> None:
        pass

    def weights(self) -> dict[str, Tensor]:
        return dict(self._stage.named_parameters())


zero1 = partial(Zero, stage=1)
zero3 = partial(Zero, stage=3)
pipeline = Pipeline
