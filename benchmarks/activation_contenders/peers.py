"""What PyTorch and its fine-tuning library offer: recompute whole layers, or move every saved tensor."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .base import Contender

SMALL_BYTES = 1024
STASH = 5


class Checkpoint(Contender):
    """torch.utils.checkpoint around each layer."""

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Keep the input, run the layer again in backward."""
        result: Tensor = checkpoint(layer, x, use_reentrant=False)
        return result


class SaveOnCpu(Contender):
    """torch.autograd.graph.save_on_cpu around the step; copies of its own where the device is the processor."""

    @contextmanager
    def around(self) -> Iterator[None]:
        """Every saved tensor, parameters too, goes to the host and comes back when it is needed."""
        if self.job.device == "cuda":
            with save_on_cpu(pin_memory=True):
                yield
            return

        def pack(tensor: Tensor) -> Tensor:
            with self.mark.host():
                return tensor.detach().clone()

        with saved_tensors_hooks(pack, torch.clone):
            yield


class OffloadActivations(Contender):
    """In the manner of torchtune: saved tensors of 1 KiB and more, but parameters, on streams of their own.

    What leaves is kept until its copy is done, at most ``STASH`` tensors; pinned memory is asked for as it goes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stream: Any = torch.cuda.Stream() if self.job.device == "cuda" else None
        self._stash: deque[tuple[Tensor, Any]] = deque()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Hooks on everything that is saved."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._stash.clear()

    def _pack(self, tensor: Tensor) -> tuple[bool, Tensor]:
        if tensor.nbytes < SMALL_BYTES or isinstance(tensor, nn.Parameter):
            return False, tensor.detach() if not tensor.is_leaf else tensor
        if self._stream is None:
            with self.mark.host():
                return True, tensor.detach().clone()
        while len(self._stash) > STASH:
            _, done = self._stash.popleft()
            torch.cuda.current_stream().wait_event(done)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor.detach(), non_blocking=True)
            self._stash.append((tensor.detach(), self._stream.record_event()))
        return True, host

    def _unpack(self, saved: tuple[bool, Tensor]) -> Tensor:
        moved, tensor = saved
        if not moved:
            return tensor
        if self._stream is None:
            return tensor.clone()
        with torch.cuda.stream(self._stream):
            back = tensor.to("cuda", non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._stream)
        back.record_stream(torch.cuda.current_stream())
        return back
