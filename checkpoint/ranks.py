"""What the ranks of a job tell each other about checkpoints, on a process group of its own.

Only when the layout changes, when a run is restored, and where saves are planned, never in between. Values are JSON;
nothing is pickled. A process without torch.distributed is a job of one rank.
"""

import json
import os
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T", int, str)


class Ranks:
    """All ranks of the job; every method is a collective."""

    def __init__(self, members: Sequence[int] | None = None) -> None:
        """All ranks, or those of ``members``, of which this is one."""
        self.rank, self.world_size = 0, 1
        self._group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            members = sorted(range(dist.get_world_size()) if members is None else members)
            self.rank, self.world_size = members.index(dist.get_rank()), len(members)
            if self.world_size > 1:
                group = dist.new_group(
                    members, backend="gloo", use_local_synchronization=len(members) < dist.get_world_size()
                )
                assert isinstance(group, dist.ProcessGroup)
                self._group = group

    def of_node(self) -> "Ranks":
        """Those on the same node as this one."""
        here = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"
        return Ranks([rank for rank, place in enumerate(self.gather(here)) if place == here])

    def close(self) -> None:
        """Leave; not a collective."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        if self._group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        arrived = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(arrived, padded, group=self._group)
        return [
            json.loads(bytes(each[: int(size)].numpy())) for each, size in zip(arrived, sizes, strict=True)
        ]

    def all_true(self, value: bool) -> bool:
        """Whether it is true on every rank."""
        return all(self.gather(value))

    def first(self, value: Any) -> Any:
        """What rank 0 says."""
        return self.gather(value if self.rank == 0 else None)[0]

    def common(self, values: Sequence[T]) -> list[T]:
        """The values that every rank has, largest first."""
        every = [set(each) for each in self.gather(list(values))]
        return sorted(set.intersection(*every), reverse=True)
