"""Point-to-point traffic between pipeline ranks, with shapes that may differ from micro-batch to micro-batch.

All ranks know the shapes of all micro-batches from the global batch, so nothing is announced: a receive of the right
size is posted ahead of its turn, and the tensor arrives where it is needed. torch's own runtime fixes one shape for
all micro-batches, and its ranks wait for each other forever if one of them differs.

Order. Each directed link carries one kind of message (activations down the pipeline, gradients up) in the order of
the schedule, which ``planners`` verifies to be the same at both ends. Gloo also matches by tag. NCCL only matches
by order and runs the messages of one communicator one after the other, so that a receive waiting for rank 0 would
hold up a send to it; there, each directed link and kind gets a communicator of its own.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.parallel.groups import GroupRegistry


class Kind(IntEnum):
    """What a message is."""

    ACTIVATION = 0
    GRADIENT = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way: ``kind`` of ``micro_batch`` for ``stage``, between global ranks ``src`` and ``dst``."""

    kind: Kind
    stage: int
    micro_batch: int
    src: int
    dst: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tag(self, num_stages: int) -> int:
        """A number that no other message of the step has."""
        return (self.micro_batch * num_stages + self.stage) * len(Kind) + self.kind


class Links:
    """The messages of one step as seen by one rank: receives run ``lookahead`` ahead, sends are collected at the end.

    ``incoming`` lists every message that this rank will take, in the order of its schedule.
    """

    def __init__(
        self,
        incoming: Sequence[Message],
        *,
        groups: GroupRegistry,
        num_stages: int,
        device: torch.device,
        lookahead: int = 4,
    ) -> None:
        self._groups = groups
        self._num_stages = num_stages
        self._device = device
        self._unposted = deque(incoming)
        self._posted: dict[tuple[Kind, int, int], tuple[Tensor, dist.Work]] = {}
        self._sends: deque[tuple[Tensor, dist.Work]] = deque()
        for _ in range(lookahead):
            self._post()

    def _post(self) -> None:
        if self._unposted:
            message = self._unposted.popleft()
            buffer = torch.empty(message.shape, dtype=message.dtype, device=self._device)
            group, tag = (
                self._groups.link(message.src, message.dst, message.kind),
                message.tag(self._num_stages),
            )
            work = dist.irecv(buffer, src=message.src, group=group, tag=tag)
            assert work is not None
            self._posted[message.kind, message.stage, message.micro_batch] = buffer, work

    def receive(self, kind: Kind, *, stage: int, micro_batch: int) -> Tensor:
        """Wait for a message of ``incoming``, and post the next receive."""
        while (kind, stage, micro_batch) not in self._posted:
            self._post()
        buffer, work = self._posted.pop((kind, stage, micro_batch))
        work.wait()
        self._post()
        return buffer

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until it has left."""
        tensor = tensor.contiguous()
        group = self._groups.link(message.src, message.dst, message.kind)
        work = dist.isend(tensor, dst=message.dst, group=group, tag=message.tag(self._num_stages))
        assert work is not None
        self._sends.append((tensor, work))
        while self._sends and self._sends[0][1].is_completed():
            self._sends.popleft()[1].wait()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._sends:
            self._sends.popleft()[1].wait()
