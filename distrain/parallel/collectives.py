"""Reduce-scatter and all-gather of flat tensors, in place: each rank's part is a slice of the whole.

NCCL does both natively. Gloo does not: its reduce-scatter is an all-reduce of a copy, twice the traffic, and its
all-gather fills fresh memory first, which costs more than sending. There, ranks send each other the slices directly::

    reduce-scatter    rank r sends slice j to rank j, and adds up what it gets for slice r
    all-gather        rank r sends slice r to all others, and gets theirs where they belong
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> object:
        """Return when its result is there (on CUDA: ordered before what the current stream does next)."""


class _Exchange:
    """Messages between all ranks of a group, and what remains to be done when they have arrived."""

    def __init__(self, works: Sequence[dist.Work | None], finish: Callable[[], object]) -> None:
        self._works, self._finish = works, finish

    def wait(self) -> None:
        for work in self._works:
            assert work is not None
            work.wait()
        self._finish()


def scratch_elements(size: int, group: dist.ProcessGroup) -> int:
    """Elements of scratch memory that ``reduce_scatter`` of ``size`` elements needs on this backend."""
    ranks = dist.get_world_size(group)
    return size // ranks * (ranks - 1) if dist.get_backend(group) == dist.Backend.GLOO else 0


def reduce_scatter(whole: Tensor, *, scratch: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum ``whole`` over ``group``; afterwards this rank's slice of it holds its part of the sum.

    The other slices are left as they are or overwritten. Both tensors are 1-D; the group's size divides the first.
    """
    rank, slices = _slices(whole, group)
    if dist.get_backend(group) != dist.Backend.GLOO:
        start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return start(slices[rank], whole, group=group, async_op=True)  # type: ignore[no-any-return]
    peers = [peer for peer in range(len(slices)) if peer != rank]
    arriving = scratch.view(len(peers), -1).unbind()
    works = [
        dist.irecv(buffer, group=group, group_src=peer) for peer, buffer in zip(peers, arriving, strict=True)
    ]
    works += [dist.isend(slices[peer], group=group, group_dst=peer) for peer in peers]

    def add_up() -> None:
        for buffer in arriving:
            slices[rank].add_(buffer)

    return _Exchange(works, add_up)


def all_gather(whole: Tensor, *, group: dist.ProcessGroup) -> Pending:
    """Start to collect in ``whole`` every rank's slice of it."""
    rank, slices = _slices(whole, group)
    if dist.get_backend(group) != dist.Backend.GLOO:
        start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return start(whole, slices[rank], group=group, async_op=True)  # type: ignore[no-any-return]
    peers = [peer for peer in range(len(slices)) if peer != rank]
    works = [dist.irecv(slices[peer], group=group, group_src=peer) for peer in peers]
    works += [dist.isend(slices[rank], group=group, group_dst=peer) for peer in peers]
    return _Exchange(works, lambda: None)


def _slices(whole: Tensor, group: dist.ProcessGroup) -> tuple[int, tuple[Tensor, ...]]:
    """This rank's place in the group, and the slices of all."""
    return dist.get_rank(group), whole.chunk(dist.get_world_size(group))
