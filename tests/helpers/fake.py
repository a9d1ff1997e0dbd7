"""A process group of any size in one process: no communication, so only shapes and coordinates can be tested."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(world_size: int = 1024, *, rank: int = 0) -> Iterator[None]:
    """Inside, this process is ``rank`` of a ``world_size`` whose collectives return at once, doing nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
