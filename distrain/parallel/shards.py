"""The part of the model states that this rank's optimizer owns, in one form for every way of sharing them.

Whatever the layout, an optimizer sees a list of ``Shard``: local parameter and gradient of the same shape, cut into
segments by the parameters they belong to. DDP and ZeRO-1 give a few flat shards (``buckets.py``), FSDP2 and HSDP one
a parameter (``fsdp.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrain.core.protocols import MicrobatchHooks, ShardBox


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start`` to ``stop`` (half-open) of a flattened shard belong to one parameter.

    They are the elements of this rank's part of the parameter, ``box``, from ``first`` on in C order.
    """

    box: ShardBox
    first: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.box.fqn


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of parameters that this rank updates. ``gradient`` is valid between ``reduce`` and the next backward."""

    param: Tensor
    """float; a leaf that views the storage the model computes with"""
    segments: tuple[Segment, ...]
    copies: int
    """ranks of the whole job that update the same elements"""
    decay: bool
    """weight decay applies (matrices, not norms)"""

    @property
    def gradient(self) -> Tensor:
        """Gradient of ``param``, summed over all replicas."""
        assert self.param.grad is not None
        return self.param.grad


class DataParallelism(MicrobatchHooks, Protocol):
    """How replicas share gradients and states. The pipeline runtime calls it around each of its steps."""

    shards: Sequence[Shard]

    def begin(self, micro_batches: int) -> None:
        """This replica's coming step has so many micro-batches; until told otherwise, as many as the last.

        Where replicas gather parameters together, they must all have as many.
        """

    def gather(self) -> None:
        """Make all of the model's parameters whole, to look at them; a forward pass does so by itself."""

    def reduce(self) -> None:
        """Finish summing the gradients of the step over all replicas; afterwards the shards' gradients are valid."""

    def updated(self) -> None:
        """The optimizer has written the shards: start spreading the new parameters."""


def box_of(name: str, tensor: Tensor) -> ShardBox:
    """What this rank holds of ``tensor``: all of a plain one, the local part of a DTensor."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ShardBox(fqn=name, dtype=dtype, global_shape=tuple(tensor.shape), offset=offset, shape=shape)


def is_decayed(param: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return param.dim() > 1


def squared_norms(tensors: Sequence[Tensor], copies: Sequence[int]) -> Tensor:
    """Sum over ``tensors`` of squared elements, each counted 1 / copies; scalar of the widest dtype."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([norm**2 / count for norm, count in zip(norms, copies, strict=True)]).sum()


def global_norm(shards: Sequence[Shard], group: dist.ProcessGroup | None = None) -> Tensor:
    """Norm of the whole model's gradient, over all axes: every rank gets the same scalar."""
    total = squared_norms([shard.gradient for shard in shards], [shard.copies for shard in shards])
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt()


def clip_(shards: Sequence[Shard], norm: Tensor, *, largest: float) -> None:
    """Scale all gradients so that their global norm is at most ``largest``."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([shard.gradient for shard in shards], factor)
