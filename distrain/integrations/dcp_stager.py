"""The copy that dcp.async_save works from, in memory that is allocated once.

torch's default stager allocates fresh memory for every save, and fresh memory costs more than copying into it. Here
copies go to slots that are used again when nothing refers to the copies in them any more. That is known without
being told: each copy's storage holds on to one object, and a weak reference to that says whether any is left.
"""

import copy
import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from distrain.core.errors import DistrainError

_ALIGN = 64
_POLL_S = 1.0  # a cycle of objects lets go of a slot only when the garbage collector runs


class DistrainStager(AsyncStager):
    """Copies a state dict to host memory before ``dcp.async_save`` returns.

    A save that begins while ``num_slots`` others are still being written waits for one of them.
    """

    _synchronize_after_execute = False

    def __init__(self, *, num_slots: int = 2, timeout_s: float = 600.0) -> None:
        self._freed = threading.Semaphore(0)
        self._slots = [_Slot(self._freed) for _ in range(num_slots)]
        self._timeout_s = timeout_s

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``state_dict`` on the CPU, of whatever it holds.

        Raises:
            DistrainError: ``timeout_s`` have passed, and all slots are still in use.
        """
        tensors = [_local(tensor) for tensor in _tensors(state_dict)]
        ends = np.cumsum([0, *(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors)]).tolist()
        memory = self._free_slot().lease(ends[-1], pinned=any(tensor.is_cuda for tensor in tensors))
        copies = [_copied(tensor, memory[start:]) for tensor, start in zip(tensors, ends, strict=False)]
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        rebuilt: dict[str, Any] = _rebuilt(state_dict, iter(copies))
        return rebuilt

    def _free_slot(self) -> "_Slot":
        waited_s = 0.0
        while not (free := [slot for slot in self._slots if not slot.in_use]):
            if waited_s >= self._timeout_s:
                raise DistrainError(
                    f"all {len(self._slots)} slots for staged checkpoints are in use",
                    got=f"none was released within {self._timeout_s:g} s",
                    hint="wait for the futures of earlier saves, and drop them",
                )
            if not self._freed.acquire(timeout=_POLL_S):
                gc.collect()
                waited_s += _POLL_S
        return free[0]

    def synchronize_staging(self) -> None:
        """Nothing to wait for: all is copied when ``stage`` returns."""

    def close(self) -> None:
        """Give the memory back, once nothing uses it."""
        self._slots = []


class _Slot:
    """Memory for one copy of the state."""

    def __init__(self, freed: threading.Semaphore) -> None:
        self._freed = freed
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._lease: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def in_use(self) -> bool:
        """Whether a copy in it is still referred to."""
        return self._lease is not None and self._lease() is not None

    def lease(self, num_bytes: int, *, pinned: bool) -> NDArray[np.uint8]:
        """The memory; the slot is in use until this array and all tensors made from it are gone."""
        if self._memory.nbytes < num_bytes or (pinned and not self._memory.is_pinned()):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        # An array over a buffer, not over an array: views of views refer to the first array only.
        lease = np.frombuffer(self._memory.numpy().data, np.uint8)
        self._lease = weakref.ref(lease, lambda _: self._freed.release())
        return lease


def _is_plain(value: object) -> bool:
    return isinstance(value, DTensor) or type(value) in (Tensor, nn.Parameter)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _copied(tensor: Tensor, memory: NDArray[np.uint8]) -> Tensor:
    """A contiguous copy of ``tensor`` at the beginning of ``memory``."""
    if not tensor.numel():
        return torch.empty_like(tensor, device="cpu")
    place = torch.from_numpy(memory[: tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor, non_blocking=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, in the order in which ``_rebuilt`` meets them."""
    if _is_plain(value):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif type(value) in (list, tuple):
        for each in value:
            yield from _tensors(each)


def _rebuilt(value: Any, copies: Iterator[Tensor]) -> Any:
    """``value`` with each tensor replaced by the next of ``copies``, and all else copied."""
    if _is_plain(value):
        local = next(copies)
        # The public way, from_local, would move a copy of a CUDA tensor back to the mesh's device.
        return DTensor(local, value._spec, requires_grad=False) if isinstance(value, DTensor) else local
    if isinstance(value, Mapping):
        return {key: _rebuilt(each, copies) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(each, copies) for each in value)
    return copy.deepcopy(value)
