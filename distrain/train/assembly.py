"""Puts the model of one rank together: its stages, cut, sharded and filled, and the runtime that drives them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.core.vocabulary import DataParallel, ModelShape, Schedule
from distrain.parallel import Parallel, PipelineRuntime
from distrain.parallel.data import share
from distrain.parallel.fsdp import wrap
from distrain.parallel.pipeline.stage import Stage
from distrain.parallel.shards import DataParallelism
from distrain.parallel.tensor import parallelize, token_loss
from distrain.planners.schedules import build
from distrain.planners.stages import stage_layers

from .model import Decoder
from .weights import materialize


@dataclass(frozen=True, slots=True)
class Assembly:
    """What one rank trains."""

    modules: dict[int, Decoder]
    """this rank's stages by their index"""
    data: DataParallelism
    runtime: PipelineRuntime
    loss: "WeightedLoss"

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of this rank's stages, in their order."""
        return [layer for _, module in sorted(self.modules.items()) for layer in module.layers.values()]

    @property
    def names(self) -> list[str]:
        """All parameters of this rank's stages, sorted."""
        return sorted(name for module in self.modules.values() for name, _ in module.named_parameters())


class WeightedLoss:
    """Sum of token losses over the number of tokens of the whole global batch, set before each step.

    Every rank knows that number from the global batch, so gradients of replicas and micro-batches need only be added
    up, however unequal they are.
    """

    def __init__(self) -> None:
        self.num_tokens = 1

    def __call__(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """This micro-batch's share of the mean loss in nats a token."""
        return token_loss(logits_BTV, targets_BT) / self.num_tokens


def assemble(
    shape: ModelShape,
    parallel: Parallel,
    *,
    schedule: Schedule,
    data: DataParallel,
    micro_batches: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    given: Callable[[str], Tensor] | None = None,
) -> Assembly:
    """Build this rank's part of the model; ``dtype`` is that of the weights, ``given`` what they are (or drawn)."""
    degrees = parallel.degrees
    plan = build(schedule, num_ranks=degrees.pp, micro_batches=micro_batches, stages_per_rank=degrees.vpp)
    pp_rank = parallel.coordinates["pp"]
    ranges = stage_layers(shape.num_layers, plan.num_stages)
    modules = {
        index: _stage(shape, ranges[index], parallel, data, dtype) for index in plan.stages_of(pp_rank)
    }
    device = parallel.device.torch_device
    for module in modules.values():
        materialize(module, device=device, seed=seed, num_layers=shape.num_layers, given=given)
    shared = share(modules, parallel, data=data, micro_batches=micro_batches)
    loss = WeightedLoss()
    runtime = PipelineRuntime(
        [Stage(m, index=i, num_stages=plan.num_stages, loss_fn=loss) for i, m in modules.items()],
        plan,
        ranks=parallel.mesh["pp"].mesh.tolist(),
        rank=pp_rank,
        groups=parallel.groups,
        device=device,
        hidden_dtype=dtype,
        hooks=(shared,),
    )
    return Assembly(modules, shared, runtime, loss)


def _stage(
    shape: ModelShape, layers: tuple[int, int], parallel: Parallel, data: DataParallel, dtype: torch.dtype
) -> Decoder:
    """One stage on the meta device, sharded as the layout says."""
    with torch.device("meta"):
        module = Decoder(shape, first_layer=layers[0], last_layer=layers[1]).to(dtype)
    parallelize(module, parallel.mesh["tp"], roles=module.roles())
    if data in (DataParallel.FSDP2, DataParallel.HSDP):
        wrap(module, list(module.layers.values()), parallel)
    return module
