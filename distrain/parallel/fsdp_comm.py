"""FSDP2's collectives through ``collectives``, for what the backend does not do well by itself."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .collectives import Pending, all_gather, reduce_scatter, scratch_elements


def exchange_directly(unit: FSDPModule) -> None:
    """Let ``unit`` gather and reduce by direct exchange, which halves gloo's traffic; for plain sums only."""
    unit.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]
    unit.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]


class _Allocating:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or arrives."""
        return torch.empty(math.prod(size), dtype=dtype, device=device)


class _AllGather(_Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Pending | None:
        own = output_tensor.chunk(group.size())[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        pending = all_gather(output_tensor, group=group)
        if async_op:
            return pending
        pending.wait()
        return None


class _ReduceScatter(_Allocating):
    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        size = scratch_elements(input_tensor.numel(), group)
        if self._scratch is None or len(self._scratch) != size or self._scratch.dtype != input_tensor.dtype:
            self._scratch = input_tensor.new_empty(size)
        whole = input_tensor.view(-1)
        reduce_scatter(whole, scratch=self._scratch, group=group).wait()
        output_tensor.copy_(whole.chunk(group.size())[group.rank()])
