"""Counts what a step has allocated at each moment, in the same way for every contender.

A mode below autograd sees the storage of every operator's result be made, and a finalizer sees it go, so the count is
of live tensors, forward and backward, whoever holds them. What is made under a ``HostMark`` stands for host memory and
is not counted, nor is what was there before the step: weights, gradients, and our preallocated host pool.
"""

from collections.abc import Mapping
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .activation_contenders.base import Contender, HostMark


class DeviceMeter(TorchDispatchMode):
    """Bytes of live tensors that were made inside, and the most there were at a time."""

    def __init__(self, mark: HostMark) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak_bytes = 0
        self._mark = mark
        self._known: dict[int, finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made."""
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _key(each) not in given:
                self._made(each.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or self._mark.depth:
            return
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self._known[key] = finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self.bytes -= num_bytes


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(contender: Contender) -> int:
    """The most that one step of ``contender`` has on the device, beside weights and their gradients."""
    contender.zero()
    with DeviceMeter(contender.mark) as meter:
        contender.step()
    peak: int = meter.peak_bytes
    return peak
