"""Moves a split from one dim to another: the all-to-all of embeddings under tensor parallelism, and of Ulysses."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def all_to_all(tensor: Tensor, group: dist.ProcessGroup, *, split_dim: int, concat_dim: int) -> Tensor:
    """Each rank gives the others their parts of ``split_dim`` and joins what it gets along ``concat_dim``.

    With n ranks, a tensor whole in ``split_dim`` and split over the ranks in ``concat_dim`` becomes whole in
    ``concat_dim`` and split in ``split_dim``; n must divide the size of ``split_dim``. Differentiable.
    """
    num_ranks = dist.get_world_size(group)
    parts = torch.stack(tensor.chunk(num_ranks, dim=split_dim))
    arrived = all_to_all_single_autograd(parts.flatten(), None, None, group).view_as(parts)
    return torch.cat(arrived.unbind(), dim=concat_dim)
