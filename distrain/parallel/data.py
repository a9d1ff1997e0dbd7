"""Chooses how the replicas of a stage share its states."""

from collections.abc import Mapping

from torch import nn

from distrain.core.vocabulary import DataParallel

from .buckets import Buckets
from .context import Parallel
from .fsdp import FullySharded
from .shards import DataParallelism


def share(
    modules: Mapping[int, nn.Module], parallel: Parallel, *, data: DataParallel, micro_batches: int
) -> DataParallelism:
    """Data parallelism of this rank's stages, by index; FSDP2 and HSDP modules are wrapped already (``fsdp.wrap``)."""
    if data in (DataParallel.FSDP2, DataParallel.HSDP):
        return FullySharded(dict(modules), parallel)
    sharded = data is DataParallel.ZERO1
    return Buckets(modules, parallel, sharded=sharded, micro_batches=micro_batches)
