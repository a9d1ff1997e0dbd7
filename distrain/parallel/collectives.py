"""Collectives on flat tensors under the names that the installed torch does not warn about (renamed in 2.13)."""

import torch.distributed as dist
from torch import Tensor


def reduce_scatter(output: Tensor, source: Tensor, *, group: dist.ProcessGroup) -> dist.Work:
    """Start to sum ``source`` over ``group`` and leave this rank its part in ``output``."""
    start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return start(output, source, group=group, async_op=True)  # type: ignore[no-any-return]


def all_gather(output: Tensor, source: Tensor, *, group: dist.ProcessGroup) -> dist.Work:
    """Start to collect every rank's ``source`` in ``output``, of which ``source`` may be this rank's part."""
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return start(output, source, group=group, async_op=True)  # type: ignore[no-any-return]
