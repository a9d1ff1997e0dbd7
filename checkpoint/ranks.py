"""What the ranks of a job tell each other about checkpoints, on a process group of its own.

Only when the layout changes and when a run is restored, never while it trains. Values are JSON; nothing is pickled. A
process without torch.distributed is a job of one rank.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """All ranks of the job; every method is a collective."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            if self.world_size > 1:
                group = dist.new_group(backend="gloo")
                assert isinstance(group, dist.ProcessGroup)
                self._group = group

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

    def common(self, values: Sequence[int]) -> list[int]:
        """The values that every rank has, largest first."""
        every = [set(each) for each in self.gather(list(values))]
        return sorted(set.intersection(*every), reverse=True)
